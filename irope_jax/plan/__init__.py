"""What a program will cost, told without running it: by the compiler's own output and by hand."""
