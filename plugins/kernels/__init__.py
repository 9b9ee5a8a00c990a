"""The portable attention kernel in Triton, its tile table, its PyTorch launcher and its ahead-of-time compiler.

Nothing is imported here: tile tables and variant lists must be readable without triton or torch.
"""
