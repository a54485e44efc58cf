"""One router a file; trainer/moe/router.py holds the seam and the list."""
