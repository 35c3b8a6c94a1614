"""The exponential parametrization cluster of one layer, and the two modes in which a weight sits on its latent."""
