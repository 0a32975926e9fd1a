"""Live transformers models: their MoE layers found, read, written, watched and masked."""
