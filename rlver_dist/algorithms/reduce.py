"""Global-count reduction: the one way in which per-token values become a loss.

A mean over a micro-batch weighs a token by how its batch was cut. Here every micro-batch of every rank
contributes the sum of its tokens divided by the token count of the whole update, so that the parts add up to
the same loss and the same gradient however tokens are spread. The learner must therefore sum gradients over
micro-batches and ranks, never average them.
"""

from __future__ import annotations

from torch import Tensor


def global_mean(values: Tensor, global_count: int) -> Tensor:
    """This part's share of the mean over all trained tokens of an update.

    Args:
        values: `[S]` a value for each of this part's trained tokens; there may be none.
        global_count: trained tokens of the whole update, over all micro-batches and ranks.

    Returns:
        Scalar; the parts' scalars sum to the mean.

    Raises:
        ValueError: the count is not positive.
    """
    if global_count < 1:
        raise ValueError(f"global_count={global_count}: an update needs at least one trained token")
    return values.sum() / global_count


def require_same_shape(**tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors have one shape; broadcasting would hide a mistake in a loss."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"tensors must have one shape, got {shapes}")
