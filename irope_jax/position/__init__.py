"""What a position does to queries, keys and logits: rotations and their frequencies, temperatures, or nothing at all.

Who may see whom is a mask and belongs to `attention`; where a token stands is `core.types.TokenInfo`.
"""
