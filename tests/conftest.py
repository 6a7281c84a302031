"""Nothing is shared here: helpers are imported (``tests.samples``), fixtures are those of hopkit's pytest plugin."""
