"""The attention kernel for compute capability 9.0: tensor copies, warpgroup products, warp specialisation."""
