"""What the plugin finds in a host's model: its layers, what they convolve with, how they treat their weight."""
