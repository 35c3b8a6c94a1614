"""On to an existing model and back: plan, apply, load, fuse."""
