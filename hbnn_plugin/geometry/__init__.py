"""The mathematics: maps on the ball and the sphere, and the few passes over weight tensors that they take."""
