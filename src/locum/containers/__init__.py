"""The experts module of a compressed layer: its layout, its two ways through, its building."""
