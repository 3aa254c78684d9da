"""Objectives on attention: what each token looks at, and how tokens relate."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_kdtl.functional import attention as fa
from hf_kdtl.models.forward.attention_hooks import Attention
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.pairing import Layers, Pair, PairingPlan
from hf_kdtl.objectives.base import check_option
from hf_kdtl.objectives.paired import PairedObjective, aligned, check_attention, check_grids
from hf_kdtl.utils.options import is_integer


class AttentionMap(PairedObjective):
    """Attention maps, per image: KL(A_T || A_S) of matched rows, mean over rows and heads, in nats, >= 0.

    A = softmax(scale q k' + bias) of each pair of blocks, made from query and key as the model computed them. Depth,
    heads, patch grid and prefix tokens may differ: the teacher's key columns are shared out by area over the student's
    grid (rows still sum to 1) and its query rows averaged; class is matched with class, other prefix tokens are
    dropped and the row renormalised.

    Prefer `attention_transfer` where a model has no full attention, `relation` where the heads matter more than where
    they look.

    Args:
        layers: uniform | last | [[student block, teacher block], ...].
        rows: "cls" the class token's row alone, nothing of size N x N is built; "all" every row.
        distance: "kl" | "mse" (of the probabilities: at most 2 / N, so give it a weight of the order of N).
        heads: "mean" averages the heads of each model; "relation" cuts queries and keys of both models into
            `relation_heads` common heads (MiniLMv2).
        relation_heads: by default the largest number, not above the student's heads, that divides both widths.

    Cost: no further forward. rows cls O(B H N d), rows all O(B H N^2 d) a pair.

    Raises:
        ValueError: for a wrong option; and when the pair is known, for blocks without full attention, rows cls
            without a class token on both sides, heads that divide no common width, or relation heads with a
            relative position bias.

    Label: [ours], after MiniLM (row KL) and MiniLMv2 (relation heads, arXiv 2012.15828); the change of grid is ours.
    """

    captures = "attention"
    citation = """@inproceedings{wang2021minilmv2,
  title = {MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers},
  author = {Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu},
  booktitle = {Findings of ACL}, year = {2021}, eprint = {2012.15828}, archivePrefix = {arXiv}
}"""

    def __init__(
        self,
        *,
        layers: Layers = "uniform",
        rows: Literal["cls", "all"] = "cls",
        distance: Literal["kl", "mse"] = "kl",
        heads: Literal["mean", "relation"] = "mean",
        relation_heads: int | None = None,
    ):
        super().__init__(layers)
        name = "attention_map"
        check_option(name, "rows", rows, rows in ("cls", "all"), "'cls' or 'all'")
        check_option(name, "distance", distance, distance in ("kl", "mse"), "'kl' or 'mse'")
        check_option(name, "heads", heads, heads in ("mean", "relation"), "'mean' or 'relation'")
        positive = relation_heads is None or is_integer(relation_heads)
        check_option(name, "relation_heads", relation_heads, positive, "a whole number above 0")
        if heads == "mean" and relation_heads is not None:
            raise ValueError(f"objective {name!r}: relation_heads is for heads='relation'; set that, or leave it out.")
        self.rows, self.distance, self.heads, self.relation_heads = rows, distance, heads, relation_heads

    def check(self, pair: Pair, plan: PairingPlan) -> None:
        check_attention(pair)
        check_grids(pair)
        for who, layer in (("student", pair.student), ("teacher", pair.teacher)):
            if self.rows == "cls" and layer.prefix[:1] != ("class",):
                raise ValueError(f"{pair}: the {who} has no class token; use rows='all'.")
        if self.heads == "relation":
            self._common_heads(pair)
            for who, model in (("student", plan.student), ("teacher", plan.teacher)):
                if model.weights_only:
                    raise ValueError(
                        f"the {who} gives attention as finished weights, without queries and keys; use heads='mean'."
                    )

    def _common_heads(self, pair: Pair) -> int:
        widths = pair.student.attention_width, pair.teacher.attention_width
        heads = self.relation_heads or fa.default_relation_heads(pair.student.heads, *widths)
        fa.check_relation_heads(heads, *widths)
        return heads

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        student, teacher = super().needs(plan)
        if self.rows == "cls" and self.heads == "mean":  # of the teacher the row alone: it can be stored
            teacher = Needs(attention_rows=teacher.attention)
        return student, teacher

    def compare(self, index: int, pair: Pair, student: Capture, teacher: Capture) -> Tensor:
        log_s = self._rows(student.attention[pair.student_layer], pair)
        if self.rows == "cls" and self.heads == "mean":
            log_t = teacher.attention_rows[pair.teacher_layer].detach()[:, None, None]
        else:
            log_t = self._rows(detached(teacher.attention[pair.teacher_layer]), pair)
        log_s, log_t = aligned(pair, log_s, log_t, fa.align_columns)
        if self.rows == "all":
            log_s, log_t = aligned(pair, log_s, log_t, fa.align_rows)
        return fa.row_divergence(log_s, log_t, self.distance)

    def _rows(self, attention: Attention, pair: Pair) -> Tensor:
        """log A of one model, (B, heads, R, N), heads averaged or split again."""
        if attention.query is None or attention.key is None:
            assert attention.weights is not None
            weights = attention.weights[:, :, :1] if self.rows == "cls" else attention.weights
            return fa.mean_heads(weights.float().clamp(min=torch.finfo(torch.float32).tiny).log())
        if self.heads == "mean":
            rows = fa.attention_rows(attention.query, attention.key, attention.scale, attention.bias, self.rows)
            return fa.mean_heads(rows)
        if attention.bias is not None:
            raise ValueError(
                "heads='relation' with a relative position bias, which belongs to the model's own heads; use "
                "heads='mean'."
            )
        heads = self._common_heads(pair)
        query, key = fa.relation_heads(attention.query, heads), fa.relation_heads(attention.key, heads)
        return fa.attention_rows(query, key, query.shape[-1] ** -0.5, None, self.rows)


class Relation(PairedObjective):
    """Self-attention relations (MiniLMv2), per image: how tokens relate, in R common heads; in nats, >= 0.

    For X in queries, keys, values: KL between the rows of softmax(X_T X_T' / sqrt d) and softmax(X_S X_S' / sqrt d);
    the mean over rows, heads and the three. Widths and heads may differ; the teacher's tokens are averaged over the
    student's grid first, class with class, other prefix tokens dropped on both sides.

    Args:
        layers: uniform | last | pairs; by default the last block with the last. The paper takes one pair.
        heads: R; by default the largest number, not above the student's heads, that divides both widths.

    Cost: no further forward; O(B N^2 (D_S + D_T)) a pair.

    Raises:
        ValueError: for a wrong option; and when the pair is known, for blocks without full attention, without queries,
            or heads that do not divide both widths (the valid ones are named).

    Label: [paper] the relations (Wang et al. 2021, arXiv 2012.15828); the mean over the three and the change of grid
    are [ours].
    """

    captures = "attention"
    citation = AttentionMap.citation

    def __init__(self, *, layers: Layers = "last", heads: int | None = None):
        super().__init__(layers)
        positive = heads is None or is_integer(heads)
        check_option("relation", "heads", heads, positive, "a whole number above 0")
        self.heads = heads

    def check(self, pair: Pair, plan: PairingPlan) -> None:
        check_attention(pair)
        check_grids(pair)
        for who, model in (("student", plan.student), ("teacher", plan.teacher)):
            if model.weights_only:
                raise ValueError(f"the {who} gives attention as finished weights, without queries, keys and values.")
        fa.check_relation_heads(self._common_heads(pair), pair.student.attention_width, pair.teacher.attention_width)

    def _common_heads(self, pair: Pair) -> int:
        widths = pair.student.attention_width, pair.teacher.attention_width
        return self.heads or fa.default_relation_heads(pair.student.heads, *widths)

    def compare(self, index: int, pair: Pair, student: Capture, teacher: Capture) -> Tensor:
        mine = student.attention[pair.student_layer]
        its = detached(teacher.attention[pair.teacher_layer])
        values = []
        for x_s, x_t in ((mine.query, its.query), (mine.key, its.key), (mine.value, its.value)):
            assert x_s is not None and x_t is not None
            values.append(fa.relation(*aligned(pair, x_s, x_t), self._common_heads(pair)))
        return torch.stack(values).mean(0)


def detached(attention: Attention) -> Attention:
    """The teacher's signals without its graph."""
    return attention._replace(
        query=_detach(attention.query),
        key=_detach(attention.key),
        value=_detach(attention.value),
        bias=_detach(attention.bias),
        weights=_detach(attention.weights),
    )


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
