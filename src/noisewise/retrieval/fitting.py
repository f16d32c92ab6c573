"""`fit_joint` and `distil_bm25`: training of a joint encoder, and of its small part, by the house's loop; no black-box calls."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from noisewise.errors import InvalidInput
from noisewise.metrics.measurement import Measurement
from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.loss import LogitScale, ranking_loss
from noisewise.retrieval.pairs import (
    Candidates,
    PairRows,
    Pairs,
    first_copies,
    hard_negatives,
    ndcg,
    split_by_passage,
)
from noisewise.retrieval.vectors import KINDS
from noisewise.training import Fit, FitResult, Plan, check_share, evaluating, fingerprint, run_fit, seeded_dropout
from noisewise.typing import check_count, check_positive

__all__ = ["RankingData", "RetrievalFit", "fit_joint"]

_KIND = "retrieval fit"
# of the loss in what chooses weights: less than any difference of nDCG that some hundred queries can have
_TRACE = 1e-4
# passages against which dev queries are ranked in a look: all of a small corpus, of a large one the dev positives and others
_LOOK_DOCUMENTS = 10_000
_ENCODED_AT_ONCE = 128
_LARGEST = 2**31


@dataclass(frozen=True)
class RankingData:
    """Texts, the black box's vectors of them, and which passages are relevant to which queries.

    Vectors are float tensors [text, dim]; they are normalised where they are used. `features`: by kind, of the augment that is
    to be trained, where they are known already, as where several are trained on the same texts. `known`: further pairs, which
    are not learned from, but whose passages are no negatives of their queries.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    query_vectors: Float[Tensor, "query dim"]
    document_vectors: Float[Tensor, "document dim"]
    pairs: Pairs
    features: Mapping[str, Any] | None = None
    known: Pairs | None = None

    def __post_init__(self) -> None:
        for name in ("query", "document"):
            texts, vectors = self.texts(name), self.vectors(name)
            if len(texts) != len(vectors):
                raise InvalidInput(f"{len(texts)} {name} texts have {len(vectors)} vectors: give one for each")
            index = getattr(self.pairs, name)
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(texts):
                raise InvalidInput(f"pairs name {name} {int(index.max())}, of {len(texts)} in all, counted from 0")

    def texts(self, kind: str) -> Sequence[str]:
        """Of queries or documents."""
        return self.queries if kind == "query" else self.documents

    def vectors(self, kind: str) -> Tensor:
        """Of queries or documents, [text, dim]."""
        return self.query_vectors if kind == "query" else self.document_vectors


@dataclass(frozen=True, repr=False)
class RetrievalFit(FitResult):
    """A `FitResult` of a joint encoder, and nDCG@10 of dev queries, each a mean over them, before and after.

    `best_step` is 0 where nothing that was trained was better than the start, which was then kept. The dev queries chose the
    step, so `dev` is a little too good: test on queries of your own.
    """

    start: Measurement | None = None
    dev: Measurement | None = None


def fit_joint(
    joint: JointEncoder,
    data: RankingData,
    *,
    dev: Pairs | float | int = 0.15,
    epochs: float | int = 10,
    batch_size: int = 32,
    lr: float | int = 3e-3,
    lambda_lr: float | int = 3e-2,
    weight_decay: float | int = 0.0,
    scale: float | int = 20.0,
    learn_scale: bool = False,
    smoothing: float | int = 0.0,
    hard_negatives: int = 0,
    chunk: int | None = None,
    warm_up: float | int = 0.1,
    clip: float | int = 1.0,
    ema: float | int = 0.9,
    patience: int = 0,
    max_seconds: float | int | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
    seed: int = 0,
) -> RetrievalFit:
    """Train `joint`, in place, on the ranking loss of pairs against each other's passages; leave it in eval mode.

    `dev`: pairs that are held out, of the same lists of texts, or the share of `data.pairs` that `split_by_passage` takes for
    it; weights of the best nDCG@10 on their queries are returned, those of the start included. `epochs`: each as many draws of
    pairs as there are. A batch has the distinct passages of its `batch_size` pairs as candidates: larger ones are nearer to a
    ranking of all passages. `scale`: 1/tau, learned from there with `learn_scale`. `lr` is the augment's rate (1e-3 to 3e-3
    for a table, 2e-5 for a pre-trained transformer), `lambda_lr` that of l(x) and of the scale; both rise for the share
    `warm_up` of the steps and fall to 0 as a cosine. `hard_negatives`: passages per query that the black box ranks highly but
    that are not relevant, as further candidates. `chunk`: texts that are encoded at once and encoded again for their gradient,
    so that memory does not grow with the batch; the gradient is the same. `patience`: looks at the dev queries, 25 in a fit,
    without a better one, after which it ends; `max_seconds` and Ctrl-C end it too. `resume`: a folder, from which the same
    call goes on to the identical result after a crash.

    Raises `InvalidInput` for black-box vectors of another dimension, zero or not finite, dev pairs that share a passage with
    the others, no pairs; `NoisewiseError` for a loss that stays non-finite; `RunFolderError` for the folder of another run.
    Source: Zhang et al. 2024 (arXiv 2402.12177).
    """
    seed = check_count("seed", seed, 0)
    copies = first_copies(data.documents)
    split = (data.pairs, dev) if isinstance(dev, Pairs) else split_by_passage(data.pairs, dev, seed, copies)
    training, held = split
    _check_apart(training, held, copies)
    replace(data, pairs=held)  # checks its indices
    for vectors in (data.query_vectors, data.document_vectors):
        joint.black_weights(vectors)
    limit = math.inf if max_seconds is None else check_positive("max_seconds", max_seconds)
    known = _joined(_joined(data.pairs, held), data.known or held)
    rows = PairRows(
        _joined(training, held), known, copies,
        _mined(data, training, known, check_count("hard_negatives", hard_negatives, 0), seed),
    )  # fmt: skip
    steps = max(
        1, round(check_positive("epochs", epochs) * math.ceil(len(training) / check_count("batch_size", batch_size)))
    )
    plan = Plan(
        steps=steps, batch_size=batch_size, learning_rate=check_positive("lr", lr),
        weight_decay=check_share("weight_decay", weight_decay, math.inf), ema=check_share("ema", ema, 1),
        clip=check_positive("clip", clip), validation=0.0, seed=seed, patience=check_count("patience", patience, 0),
    )  # fmt: skip
    ranker = Ranker(joint, LogitScale(scale, learn_scale))
    objective = _JointObjective(data, joint, held, smoothing, chunk, seed)
    config = {
        **vars(plan), "lambda_lr": check_positive("lambda_lr", lambda_lr), "warm_up": check_share("warm_up", warm_up, 1),
        "scale": scale, "learn_scale": learn_scale, "smoothing": smoothing, "hard_negatives": hard_negatives,
        "chunk": chunk, "data": _digest(data, rows.pairs), "start": fingerprint(list(ranker.state_dict().values())),
    }  # fmt: skip
    first = {name: weight.detach().clone() for name, weight in joint.named_parameters()}
    queries = held.query.unique()
    least, begin = objective.worth(ranker, queries)
    joint.train()
    fit = Fit(
        ranker, rows, objective, plan, counted=joint, measure=objective.measure, warm_up=config["warm_up"],
        groups=_groups(ranker, plan, lambda_lr), look_rows=_LARGEST,
        split=(torch.arange(len(training), len(rows)), torch.arange(len(training))),
    )  # fmt: skip
    result = replace(run_fit(fit, _KIND, config, resume, limit, progress), net=joint)
    joint.eval()
    reached, end = objective.worth(ranker, queries)
    if not reached < least:
        with torch.no_grad():
            for name, weight in joint.named_parameters():
                weight.copy_(first[name])
        result, end = replace(result, best_step=0), begin
    return RetrievalFit(**vars(result), start=_mean_of(begin), dev=_mean_of(end))


class Ranker(nn.Module):
    """An encoder and the scale of its cosines: what a fit trains."""

    def __init__(self, encoder: nn.Module, scale: LogitScale) -> None:
        super().__init__()
        self.encoder, self.scale = encoder, scale


class _JointObjective:
    """The ranking loss of a batch of pairs, and what dev queries have to say."""

    def __init__(
        self, data: RankingData, joint: JointEncoder, dev: Pairs, smoothing: float | int, chunk: int | None, seed: int
    ) -> None:
        device = next(joint.parameters()).device
        self.black = {kind: data.vectors(kind).detach().to(device) for kind in ("query", "document")}
        self.features = data.features or {kind: joint.augment.features(data.texts(kind), kind) for kind in KINDS}
        self.dev, self.shown = dev, _look_documents(dev, len(data.documents), seed)
        self.smoothing = check_share("smoothing", smoothing, 1)
        self.chunk = None if chunk is None else check_count("chunk", chunk)

    def __call__(self, ranker: Any, batch: Candidates, generator: torch.Generator) -> Tensor:
        with seeded_dropout(generator):
            q = self._encoded(ranker.encoder, "query", batch.queries, self.chunk)
            d = self._encoded(ranker.encoder, "document", batch.documents, self.chunk)
        return ranking_loss(ranker.scale(q @ d.T), batch.target.to(q), smoothing=self.smoothing)

    def measure(self, ranker: Any, batch: Candidates, generator: torch.Generator) -> Tensor:
        """Of held-out rows."""
        return self.worth(ranker, batch.queries)[0]

    def worth(self, ranker: Any, queries: Tensor) -> tuple[Tensor, Float[Tensor, " query"]]:
        """What is to be least, 1 - nDCG@10 and, to tell equal ones apart, a trace of the loss; and nDCG@10 of each query.

        Few dev queries are often all answered right, by a start that is not yet sure of it too.
        """
        values, losses = self.dev_ndcg(ranker, queries)
        loss = losses.mean()
        return 1 - values.mean() + _TRACE * loss / (1 + loss), values

    @torch.no_grad()
    def dev_ndcg(self, ranker: Any, queries: Tensor) -> tuple[Float[Tensor, " query"], Float[Tensor, " query"]]:
        """nDCG@10 of dev queries, and their loss, among the passages that a look shows."""
        joint = ranker.encoder
        found, losses = [], []
        with evaluating(joint):
            d = self._encoded(joint, "document", self.shown, None)
            for some in queries.split(_ENCODED_AT_ONCE):
                scores = (self._encoded(joint, "query", some, None) @ d.T).cpu()
                grades = self.dev.grades(some, self.shown)
                found.append(ndcg(scores, grades))
                losses.append(ranking_loss(ranker.scale(scores.to(d)).cpu(), grades).double().expand(len(some)))
        return torch.cat(found), torch.cat(losses)

    def _encoded(self, joint: Any, kind: str, index: Tensor, chunk: int | None) -> Tensor:
        black, features = self.black[kind], self.features[kind]
        parts = [(black[some.to(black.device)], features[some]) for some in index.split(chunk or _ENCODED_AT_ONCE)]
        if chunk is None or not torch.is_grad_enabled():
            return torch.cat([joint(*part) for part in parts])
        return torch.cat([checkpoint(joint, *part, use_reentrant=False) for part in parts])


def _groups(ranker: Ranker, plan: Plan, lambda_lr: float | int) -> list[dict[str, Any]]:
    """The augment's parameters, and the few others with a rate of theirs and without decay."""
    own = {id(p) for p in ranker.encoder.augment.parameters()}  # type: ignore[union-attr]
    trained = [p for p in ranker.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in own], "lr": plan.learning_rate, "weight_decay": plan.weight_decay},
        {"params": [p for p in trained if id(p) not in own], "lr": float(lambda_lr), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _joined(first: Pairs, second: Pairs) -> Pairs:
    parts = zip((first.query, first.document, first.grade), (second.query, second.document, second.grade), strict=True)
    return Pairs(*(torch.cat(part) for part in parts))


def _check_apart(training: Pairs, dev: Pairs, copies: Tensor) -> None:
    if not len(training) or not len(dev):
        raise InvalidInput(f"{len(training)} pairs to train on and {len(dev)} dev pairs: both must be some")
    shared = torch.isin(copies[dev.document], copies[training.document])
    if bool(shared.any()):
        raise InvalidInput(
            f"{int(shared.sum())} dev pairs have a passage that is trained on, the first of them document "
            f"{int(dev.document[shared][0])}: split by passage, as split_by_passage does"
        )


def _mined(data: RankingData, training: Pairs, known: Pairs, k: int, seed: int) -> Tensor | None:
    if not k:
        return None
    q, d = (nn.functional.normalize(data.vectors(kind), dim=1) for kind in ("query", "document"))
    asked = torch.isin(known.query, training.query).nonzero().flatten()
    return hard_negatives(q, d, known[asked], k, seed)


def _look_documents(dev: Pairs, documents: int, seed: int) -> Tensor:
    if documents <= _LOOK_DOCUMENTS:
        return torch.arange(documents)
    order = torch.randperm(documents, generator=torch.Generator().manual_seed(seed))
    return torch.cat([dev.document, order[:_LOOK_DOCUMENTS]]).unique()


def _mean_of(values: Tensor) -> Measurement:
    se = None if len(values) < 2 else float(values.std()) / math.sqrt(len(values))
    return Measurement(float(values.mean()), se=se, n=len(values), better="higher")


def _digest(data: RankingData, pairs: Pairs) -> str:
    """Of everything that a fit learns from."""
    content = hashlib.sha256()
    for text in (*data.queries, *data.documents):
        content.update(text.encode("utf-8", "surrogatepass") + b"\0")
    for tensor in (data.query_vectors, data.document_vectors, pairs.query, pairs.document, pairs.grade):
        content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()
