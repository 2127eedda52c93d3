"""Leave PyTorch: the room for exporters (installed as micl_zoo.export). No exporter has been written yet."""
