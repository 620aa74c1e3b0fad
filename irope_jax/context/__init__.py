"""The same attention when the sequence spans devices. Nothing here changes what attention computes, only where."""
