"""Objectives that hold a student to the model it started from, and one that lets go of what transfers badly."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hf_kdtl.functional.divergences import cross_entropy, labelled
from hf_kdtl.functional.resample import precise
from hf_kdtl.functional.start import channel_distance, channel_rises, importance_of_rises, l2_sp, smallest_singular
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.pairing import Pair, PairingPlan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.objectives.base import Batch, Objective, Sample, check_option
from hf_kdtl.objectives.paired import PairedObjective, as_tokens
from hf_kdtl.utils.options import is_integer, is_number

# Of 0.001 to 1 the one at which a probe on 128 and 256 of CIFAR-10's training images ranks the channels of a trained
# ViT most like the ViT's own head does; from 0.1 on it fits so small a sample too well.
PROBE_C = 0.01


class L2SP(Objective):
    """Closeness to the start's weights: 1/2 ||w - w0||^2 over what is trained of the backbone, >= 0.

    To it comes head_weight / 2 ||v||^2 over the head's weights and biases v, which have nothing to be close to. With
    LoRA w - w0 is the product of the adapters. One number, whatever the images: although `reduction` is "batch", it
    does not depend on how the batch is split, because it counts once per image and is divided by their number.

    The weight is that of a usual weight decay, about 1e-3 to 1e-1. AdamW's own decay pulls the same weights to 0 and
    works against it: set weight_decay to 0 with it. Adam divides the pull, as any gradient, by the size of the
    recent ones; only plain SGD takes the step w - lr (g + weight (w - w0)).

    Args:
        head_weight: of the head's part, >= 0. At 0 nothing holds the head where weight_decay is 0, too.

    Cost: no forward; a few passes over the weights, the gradient in closed form.

    Raises:
        ValueError: for a head_weight below 0; under FSDP2; in the forward pass where nothing of the backbone is
            trained.

    Label: [paper], Li, Grandvalet, Davoine 2018, arXiv 1802.01483, which gives the new head its own L2; the default
    of 0 for it is [ours].
    """

    reduction = "batch"
    of_weights = True
    source = "start"
    needs_teacher = False
    citation = """@inproceedings{li2018explicit,
  title = {Explicit Inductive Bias for Transfer Learning with Convolutional Networks},
  author = {Li, Xuhong and Grandvalet, Yves and Davoine, Franck},
  booktitle = {ICML}, year = {2018}, eprint = {1802.01483}, archivePrefix = {arXiv}
}"""

    def __init__(self, *, head_weight: float = 0.0):
        super().__init__()
        valid = is_number(head_weight) and head_weight >= 0
        check_option("l2_sp", "head_weight", head_weight, valid, "a number of at least 0")
        self.head_weight = head_weight
        self.divergence = head_weight == 0

    def prepare(self, context: RunContext) -> list[str]:
        if context.sharded:
            raise ValueError(
                "under FSDP2 each process holds a part of every weight, and l2_sp compares full ones. Use DDP, or "
                "'delta', which compares features."
            )
        return []

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        return Needs(), Needs(weights=True)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        backbone = [(w.now, w.then) for w in teacher.weights if not w.head and w.then is not None]
        head = [w.now for w in teacher.weights if w.head]
        if not backbone:
            raise ValueError(
                f"l2_sp holds the student's backbone to the start, and only {len(head)} tensors of the head are "
                "trained. Unfreeze the backbone, or leave l2_sp out."
            )
        value = l2_sp(*zip(*backbone, strict=True))
        if self.head_weight and head:
            value = value + self.head_weight * l2_sp(head, [torch.zeros_like(w) for w in head])
        return value


class Delta(PairedObjective):
    """Closeness to the start's features, channel by channel, per image: sum_c w_c mean_n (h_S - h_0)_{n,c}^2, >= 0.

    h are the outputs of the same block in student and start, w_c how much the start's loss on the new data rises when
    channel c is set to 0: standardised over the channels of the block, then a softmax at temperature 5, of sum 1. A
    channel that the new task needs is held more than one that it does not. Prefer `l2_sp` where memory is short,
    `hidden_states` for another architecture than the student's.

    The w_c are measured once, before training, on a sample of its images: a logistic regression of the labels on the
    start's pooled features stands in for its head, which may be new or for other classes, and one backward pass gives
    the first-order rise -<dL/dh_c, h_c> of all channels of all blocks. They are saved with the run. In the last block
    of a model with a class token the loss reads this token alone, and so it alone weighs the channels there.

    Args:
        layers: "all", "last", or block indices. All by default: the value is a mean over blocks, so that a weight
            means the same, and in the inner ones every token has a say in the channels' weights.
        sample: how many training images are read, in batches of the training's size.

    Cost: one forward of the start each step, O(B N D) a block; before training two forwards and a backward of the
    sample.

    Raises:
        ValueError: for layers that do not exist or differ in shape; for a sample without labels, of one class or of
            fewer than two labelled images a class; in the forward pass before `observe`.

    Label: the weighting is that of [paper: the authors' code] of DELTA, Li et al. 2019, arXiv 1901.09229, which trains
    a linear classifier on the source's features and leaves out one channel after the other. The logistic regression,
    the first order and the mean over blocks and tokens without the factor D / 2 are [ours].
    """

    source = "start"
    needs_teacher = False
    citation = """@inproceedings{li2019delta,
  title = {{DELTA}: Deep Learning Transfer using Feature Map with Attention for Convolutional Networks},
  author = {Xingjian Li and Haoyi Xiong and Hanchao Wang and Yuxuan Rao and Liping Liu and Jun Huan},
  booktitle = {ICLR}, year = {2019}, eprint = {1901.09229}, archivePrefix = {arXiv}
}"""

    def __init__(self, *, layers: Literal["all", "last"] | list[int] = "all", sample: int = 256):
        super().__init__("last")
        listed = isinstance(layers, list) and layers and all(type(i) is int for i in layers)
        expected = "'all', 'last', or block indices such as [2, 5]"
        check_option("delta", "layers", layers, layers in ("all", "last") or bool(listed), expected)
        check_option("delta", "sample", sample, is_integer(sample, 4), "a whole number of at least 4")
        self.blocks, self.sample = layers, sample
        self.measured = False

    def build(self, plan: PairingPlan | None) -> None:
        if plan is None:
            raise ValueError("it compares the blocks of the student with those of its start, and there is none.")
        depth = len(plan.student.layers)
        blocks = {"all": list(range(depth)), "last": [-1]}.get(str(self.blocks), self.blocks)
        self.layers = [[i, i] for i in blocks if isinstance(i, int)]
        super().build(plan)
        for i, pair in enumerate(self.pairs):
            self.register_buffer(f"importance_{i}", torch.zeros(pair.student.width))

    def check(self, pair: Pair, plan: PairingPlan) -> None:
        shapes = [(layer.layout, layer.prefix, layer.grid, layer.width) for layer in (pair.student, pair.teacher)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{pair}: the student gives {shapes[0]} and its start {shapes[1]}; expected the same. Give a start of "
                "the student's architecture, or use hidden_states with it as the teacher."
            )

    def multi_label_problem(self) -> str:
        return "its sample needs one label an image; take l2_sp."

    def sample_needs(self, plan: PairingPlan | None) -> Needs:
        return self.needs(plan)[1] | Needs(pooled=True, input_gradient=True)

    def observe(self, batches: Sample) -> None:
        features, targets = _labelled_features(batches)
        weight, bias = linear_probe(features, targets)
        rises: list[Any] = [0] * len(self.pairs)
        first = 0
        for source, labels in batches:
            assert source.pooled is not None and labels is not None
            known = labelled(labels)
            here = targets[first : (first := first + int(known.sum()))]
            if not len(here):
                continue
            loss = cross_entropy(precise(source.pooled[known]) @ weight.T + bias, here).sum()
            hidden = [source.hidden_states[pair.teacher_layer] for pair in self.pairs]
            for i, (h, gradient) in enumerate(zip(hidden, torch.autograd.grad(loss, hidden), strict=True)):
                rises[i] = rises[i] + channel_rises(as_tokens(h.detach()), as_tokens(gradient))
        for i, rise in enumerate(rises):
            self.get_buffer(f"importance_{i}").copy_(importance_of_rises(rise))

    def entries(self, student: Capture, teacher: Capture) -> list[Tensor]:
        if not self.measured:  # asked until it is: to read a buffer makes a GPU wait
            if not all(bool(weights.any()) for weights in self.buffers()):
                raise ValueError(
                    "delta has not measured how much each channel matters. DistillationTrainer.train does it; by hand "
                    "call observe([(<Capture of the start, with a graph>, labels)]) first."
                )
            self.measured = True
        return super().entries(student, teacher)

    def compare(self, index: int, pair: Pair, student: Capture, teacher: Capture) -> Tensor:
        mine = as_tokens(student.hidden_states[pair.student_layer])
        its = as_tokens(teacher.hidden_states[pair.teacher_layer].detach())
        return channel_distance(mine, its, self.get_buffer(f"importance_{index}"))


class BSS(Objective):
    """Batch spectral shrinkage: the sum of the k smallest squared singular values of the features (B, D), >= 0.

    What the classifier reads, one row an image. Directions that vary little over a batch are those that transfer
    badly; they are pressed to 0 (Chen et al. 2019). It compares with nothing: use it with `task` alone, or with
    `l2_sp` or `delta`, which hold the rest.

    A batch statistic: the singular values are of one micro-batch of one process, so the value depends on how the
    effective batch is split. It is one number, counted once per image of its micro-batch. With batches larger than D
    it acts on the least varied channels, with smaller ones on the images that are most alike.

    Args:
        k: how many singular values, 1 <= k < min(B, D).

    Cost: a singular value decomposition of (B, D) in float32, O(B D min(B, D)).

    Raises:
        ValueError: for a k below 1; in the forward pass where a micro-batch has k images or fewer, or features k
            channels or fewer.

    Label: [review], Chen et al. 2019, NeurIPS, as re-implemented in public.
    """

    reduction = "batch"
    divergence = False
    needs_teacher = False
    citation = """@inproceedings{chen2019catastrophic,
  title = {Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe Transfer Learning},
  author = {Xinyang Chen and Sinan Wang and Bo Fu and Mingsheng Long and Jianmin Wang},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {32}, year = {2019}
}"""

    def __init__(self, *, k: int = 1):
        super().__init__()
        check_option("bss", "k", k, is_integer(k), "a whole number of at least 1")
        self.k, self.least_images = k, k + 1

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        return Needs(pooled=True), Needs()

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        assert student.pooled is not None
        return smallest_singular(student.pooled, self.k)


def _labelled_features(batches: Sample) -> tuple[Tensor, Tensor]:
    """The pooled features of a sample's labelled images, (n, D), and their classes by number, (n,)."""
    features, classes = [], []
    for source, labels in batches:
        if labels is None:
            raise ValueError(
                "delta weighs channels by the labels of its sample, and the data has none. Give the training data a "
                "column 'labels', or use l2_sp, which needs none."
            )
        assert source.pooled is not None
        known = labelled(labels)
        features.append(source.pooled.detach()[known])
        classes.append(labels[known] if labels.ndim == 1 else labels[known].argmax(-1))
    names, targets = torch.cat(classes).unique(return_inverse=True)
    if len(names) < 2 or len(targets) < 2 * len(names):
        raise ValueError(
            f"delta's sample has {len(targets)} labelled images of {len(names)} classes; expected two classes or "
            "more, and at least two images of each on average. Raise sample, or label more of the images."
        )
    return torch.cat(features), targets


def linear_probe(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of a logistic regression of the classes 0 ... K - 1, (n,), on features (n, D).

    Fitted to features of mean 0 and standard deviation 1, with L2 of strength 1 / PROBE_C over the summed loss; in
    float64, and the same at every call. Given for the features as they are, in float32 at least.
    """
    x, like = features.double().cpu(), precise(features)
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    from sklearn.linear_model import LogisticRegression  # for those who use `delta` alone

    regression = LogisticRegression(C=PROBE_C, max_iter=1000, tol=1e-6)
    regression.fit(((x - mean) / std).numpy(), targets.cpu().numpy())
    weight, bias = (torch.as_tensor(array) for array in (regression.coef_, regression.intercept_))
    if len(weight) == 1:  # of two classes only the second against the first
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    weight = weight / std
    return weight.to(like), (bias - weight @ mean).to(like)
