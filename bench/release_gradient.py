"""From which width on is behaviour "release" usable? Its diffusion loss flows into the embeddings that the KGC loss
trains.

Prints, for each width D, the ratio of the two gradients' norms on the structural embeddings of a batch at
initialisation, and the validation MRR after some epochs with the diffusion loss flowing into the embeddings and
without. Generated negatives are left out (their weight is 0.01).

    python bench/release_gradient.py --data MKG-Y_FOLDER --dims 64 128 256 512 --epochs 20
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from dhns_fast.train import TrainConfig, Trainer, prepare_graph


class WithoutSampling(Trainer):
    """The release's step up to the generator's update."""

    def _dhns(self, batch: Tensor, terms: dict[str, Tensor]) -> None:
        assert self.generator is not None
        assert self.generator_optimizer is not None
        h, r, t = batch.unbind(1)
        self.generator_optimizer.zero_grad(set_to_none=True)
        terms["diffusion"] = self.generator(
            self.model.modalities(h), self.model.relation(r), self.model.modalities(t), generator=self.rng
        )
        terms["diffusion"].backward(retain_graph=self.config.behaviour == "release")
        self.generator_optimizer.step()


def gradient_ratio(trainer: Trainer) -> float:
    """‖∂L_diff‖/‖∂L_KGC‖ on the rows of a batch's heads and tails."""
    assert trainer.generator is not None
    model, batch = trainer.model, trainer.train[: trainer.batch_size]
    h, r, t = batch.unbind(1)
    kgc = trainer._kgc(trainer._asked(batch, 0))
    diffusion = trainer.generator(model.modalities(h), model.relation(r), model.modalities(t), generator=trainer.rng)
    rows = torch.cat([h, t]).unique()
    of_kgc, of_diffusion = (torch.autograd.grad(loss, model.entity.weight)[0][rows].norm() for loss in (kgc, diffusion))
    return (of_diffusion / of_kgc).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="atlas")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2000)
    options = parser.parse_args()
    print(f"{'D':>5} {'ratio':>6} {'MRR release':>12} {'MRR detached':>13}")
    for dim in options.dims:
        mrr, ratio = {}, 0.0
        for behaviour in ("release", "corrected"):
            config = TrainConfig(
                data=options.data, features="none", model="distmult", dim=dim, behaviour=behaviour, epochs=options.epochs,
                batch_size=options.batch_size, validate_every=options.epochs,
            )  # fmt: skip
            trainer = WithoutSampling(config, prepare_graph(config)[0])
            if behaviour == "release":
                ratio = gradient_ratio(trainer)
            mrr[behaviour] = trainer.fit().best_mrr
        print(f"{dim:5d} {ratio:6.2f} {mrr['release']:12.4f} {mrr['corrected']:13.4f}", flush=True)


if __name__ == "__main__":
    main()
