"""Leave PyTorch: the room for exporters. None has been written yet."""
