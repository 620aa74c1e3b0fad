"""Plain lists of words for keys; what they are used for is `words`."""

from __future__ import annotations


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _listed("""
able amber ancient ashen awake azure bashful bitter blank blunt bold brave brief bright brisk broad broken bronze calm
careful cheap civil clear clever cloudy coarse cold common copper coral cosy crimson crisp crooked curious daily damp
dark dear deep distant dizzy double dry dull dusty eager early earthen easy elder empty equal even exact faint fair
faithful false famous fancy fast fearless fierce final fine firm flat fond foreign formal frank free fresh frosty full
gentle gifted glad gloomy golden grand grateful grave green grim hardy harsh hasty hazel heavy hidden hollow honest
humble hungry icy idle inner ivory jolly keen kind large late lazy level light little lively local lofty lonely long
loose loud loyal lucky marble mellow merry mild misty modern modest narrow native neat nimble noble northern odd old
open orange outer pale patient plain pleasant polite proud pure purple quaint quick quiet rapid rare ready regal
remote rich rigid ripe robust rosy rough round royal rural rusty sandy scarlet secret serene severe shaggy sharp shiny
short shy silent silver simple sleepy slender slow small smooth snowy sober soft solid southern spare stable steady
steep stern stiff stout strange strict strong sturdy subtle sudden sunny sweet swift tall tame tardy tender thick thin
tidy tiny tough tranquil true upper urban useful vague vast velvet vivid warm wary weary western white whole wide wild
windy wise witty wooden worthy young
""")

NOUNS = _listed("""
acorn alley anchor antler apple apron arch arrow attic badge bakery balcony ballad banner barley barn barrel basin
basket beacon beaver bell bench berry bishop blanket blossom boat bonnet bottle boulder bowl branch bread bridge broom
bucket butter button cabin cable cactus camel canal candle canoe canyon carpet cart castle cavern cedar cellar chain
chalk chapel cherry chimney circle citadel clay cliff cloak clock clover coach coast cobbler coffee collar comet
compass copse cottage cradle crane crater cricket crown crystal cupboard curtain dagger daisy desert diary donkey door
dragon drawer drum eagle easel echo elbow ember engine falcon farmer feather fence fern ferry fiddle field finch flag
flame flute forest fountain fox frame galley garden garlic garment gate ginger glacier glove goblet goose grain grape
gravel guitar gull hammer hamlet harbour harp harvest hatch hawk hazelnut hedge helmet heron hill hinge honey horn
hound inlet island ivy jacket jar jasmine jewel journal jungle kettle kitten ladder lagoon lake lamp lantern lark lawn
leaf ledger lemon lever lily linen lion lizard locket lodge loom magnet mantle maple market marsh mast meadow medal
melon mill mirror mitten moat monk moon moss moth mountain mule museum needle nest nettle oak oar oasis olive onion
orchard organ otter oven owl paddle palace paper parade parcel parrot pasture path pebble pepper piano pigeon pillar
pine pitcher plank planet plough plum pocket pond poplar porch pottery prairie puddle pulley pumpkin puzzle quarry
quilt rabbit raft rail rake raven reed ribbon ridge ring river robin rocket roof rope rose saddle sail salmon sandal
school scroll seed shadow shawl shed shell shepherd shield shore shovel shutter signal sled slope snail spade sparrow
spider spoon spring squirrel stable staircase statue stone stork storm stove stream street sundial swallow swan table
tailor tapestry temple tent thimble thistle thorn throne ticket tiger timber torch tower trail trumpet tulip tunnel
turnip turtle valley vase velvet village vine violet violin wagon walnut water weaver wheat wheel whistle willow
window wolf wren yard
""")
