"""State on disk and back. What is in a state is the business of `train`; other formats get a file each."""
