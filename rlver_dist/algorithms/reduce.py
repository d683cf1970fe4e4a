"""Global-count reduction: the one way in which per-token values become a loss.

With a mean over each micro-batch, a token's weight would depend on how many others share its micro-batch.
Here every micro-batch of every rank contributes the sum of its tokens divided by the token count of the whole
update. These terms add up to the same loss and the same gradient however tokens are spread. The learner must
therefore sum gradients over micro-batches and ranks, never average them.
"""

from __future__ import annotations

from torch import Tensor


def global_mean(values: Tensor, global_count: int) -> Tensor:
    """A micro-batch's term of the mean over all trained tokens of an update.

    Args:
        values: `[S]` a value for each of the micro-batch's trained tokens; there may be none.
        global_count: trained tokens of the whole update, over all micro-batches and ranks.

    Returns:
        Scalar; over all micro-batches and ranks these sum to the mean.

    Raises:
        ValueError: the count is not positive.
    """
    if global_count < 1:
        raise ValueError(f"global_count={global_count}: an update needs at least one trained token")
    return values.sum() / global_count


def require_same_shape(**tensors: Tensor) -> None:
    """Check that all tensors have one shape, since broadcasting would hide a mistake in a loss.

    Args:
        tensors: of any shape, by the names that an error gives them.

    Raises:
        ValueError: two shapes differ.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"tensors must have one shape, got {shapes}")
