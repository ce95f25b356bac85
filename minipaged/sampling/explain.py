"""The text of `CompletionOutput.error`: why no token could be chosen from a row of logits."""

from torch import Tensor

from minipaged.utils.shapes import Float


def explain_error(logits: Float[Tensor, " vocab"], adjusted: Float[Tensor, " vocab"]) -> str:
    """Explain what is wrong with a row, and what to try.

    Args:
        logits: the model's logits.
        adjusted: the logits after the request's options.
    """
    num_nan, num_infinite = int(logits.isnan().sum()), int(logits.isposinf().sum())
    if not num_nan and not num_infinite and logits.amax().isfinite():
        return (
            "logit_bias, min_tokens with its stop tokens, or the penalties leave no token to "
            f"choose: the largest logit after them is {float(adjusted.amax())}. Choose less "
            "extreme values."
        )
    kind = "NaN" if num_nan else "+inf" if num_infinite else "-inf"
    return (
        f"{num_nan or num_infinite or len(logits)} of {len(logits)} logits are {kind}, so no token "
        'can be chosen. Try dtype="float32" and kv_cache_dtype="auto", whose range is larger; if '
        "that does not help, the weights of the model are damaged."
    )
