"""The bundled reference model: its held-out text, its training and its evaluation."""
