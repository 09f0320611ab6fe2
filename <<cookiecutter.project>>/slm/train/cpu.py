"""TRL 1.15 computes its losses in a Triton kernel, which a CPU does not have; here the same in plain torch."""

from slm.train.recipe import processes


def patch_trl() -> None:
    """Without a GPU, give TRL's fused LM head a plain implementation, whether Triton is installed or not."""
    import torch
    from trl.trainer import utils

    if not torch.cuda.is_available():
        utils._ChunkedLogProbFunction = PlainLogProbs
        if processes() > 1:  # accelerate calls their device cpu:0, which torch.load does not know when a run is resumed
            torch.serialization.register_package(50, lambda _: None, lambda data, where: data if where.startswith("cpu:") else None)


class PlainLogProbs:
    """Stands in for `trl.kernels.ChunkedLogProbFunction`: same arguments, same five per-token results."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        """`hidden` (n, width) at the n trained positions, `weight` (vocabulary, width), `targets` (n,); results are
        (n,). Only trained positions are projected, which is most of the saving: the head is a fifth of a 135M model's
        work."""
        import torch

        logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature if temperature != 1 else logits
        log_probs = torch.log_softmax(logits, dim=-1)
        chosen = log_probs.gather(1, targets[:, None]).squeeze(1)
        entropy = square = mean = top = None
        if "entropy" in outputs:
            entropy = -(log_probs.exp() * log_probs).sum(-1)
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                square = torch.logsumexp(2 * log_probs, dim=-1)
            if "mean_logits" in outputs:
                mean = logits.mean(-1)
            if "is_top1" in outputs:
                top = log_probs.argmax(-1) == targets
        return chosen, entropy, square, mean, top
