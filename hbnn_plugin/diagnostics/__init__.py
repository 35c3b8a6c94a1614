"""What training did: flips of binary weights, and where the points are."""
