"""Model repositories of Triton Inference Server, and the model that its Python backend runs. Level 5; no torch."""
