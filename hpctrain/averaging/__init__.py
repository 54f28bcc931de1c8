"""From gradients to new weights: flat buckets, one sum over the replicas, the optimizer's step."""
