"""What a model can do, measured: parameters in, measurements out. Training calls these on schedule; so does `irope eval`."""
