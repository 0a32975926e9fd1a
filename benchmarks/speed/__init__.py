"""How long things take: layers, whole models, calibration, search, and the container on a GPU."""
