"""The candidates for the guard: each learned on some labelled queries and measured on others, weights included."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.retrieval.fitting import RankingData, RetrievalFit, fit_joint
from noisewise.retrieval.forms import Form
from noisewise.retrieval.guard import Candidate, GuardReport, choose
from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.lexical import LexicalBlock
from noisewise.retrieval.pairs import Pairs, folds_by_passage, ndcg, split_by_passage

__all__ = ["Selection", "Selector"]

# a share of labelled queries smaller than this, and every one of them is judged on by cross-fitting
_ENOUGH, _SHARE, _FOLDS = 50, 0.2, 5
# weights of words, and of a small model, beside what is there already
_WEIGHTS = tuple(0.05 * 2 ** (i / 2) for i in range(20))
# weighting=w of a joint encoder that is its small part alone: the black box counts 1 / w^2
_ALONE = 1e4

BLACK, WORDS, CONCATENATION, FUSION = "black box", "black box + words", "concatenation", "late fusion"
MAFIN, LAMBDA, MAFIN_WORDS, BM25_ALONE = "Mafin", "lambda-Mafin", "Mafin + words", "BM25"


@dataclass(frozen=True)
class Selection:
    """The form that was chosen, the guard's table (None where nothing was judged), and the fits behind them, by name."""

    form: Form
    report: GuardReport | None
    fits: dict[str, RetrievalFit]


@dataclass
class Selector:
    """Everything that candidates are made from. `data.pairs`: all that is judged, `dev` among it, on which is chosen then.

    `augment`: prepared and at its start, or None; `lexical`: fitted, or None. `weighting`: of Mafin. `options`: of `fit_joint`.
    `resume`: a folder with one for each fit.
    """

    data: RankingData
    dev: Pairs | None
    augment: Any
    lexical: LexicalBlock | None
    weighting: str | float | int
    options: dict[str, Any]
    seed: int = 0
    resume: Path | None = None
    progress: bool = False
    fits: dict[str, RetrievalFit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        documents, queries = self.data.documents, self.data.queries
        self.black_dim = self.data.document_vectors.shape[1]
        self.grades = self.data.pairs.grades(torch.arange(len(queries)), torch.arange(len(documents)))
        self.labelled = self.data.pairs.query.unique()
        self.by_black = self.data.query_vectors @ self.data.document_vectors.T
        self.by_words: Tensor | None = None
        if self.lexical is not None:
            self.by_words = self.lexical.encode_query(queries) @ self.lexical.encode_document(documents).T

    # ---- judged

    def select(self) -> Selection:
        """Judge all candidates, and build the one that the guard chose."""
        parts = self._parts()
        held = torch.cat([part for _, part in parts])
        fold = torch.cat([torch.full((len(part),), index) for index, (_, part) in enumerate(parts)])
        if len(parts) == 1:
            order = np.random.default_rng(self.seed).permutation(len(held))
            fold = torch.from_numpy(order % min(_FOLDS, len(held)))
        trained = self._trained(parts) if self.augment is not None else {}
        candidates, weights = self._judge(held, fold, trained)
        crossed = f"{_FOLDS}-fold cross-fitting, so that every labelled query counts" if len(parts) > 1 else ""
        report = choose(candidates, len(self.labelled), notes=(f"By {crossed}.",) if crossed else ())
        return Selection(self._built(report.choice, weights, parts), report, self.fits)

    def build(self) -> Selection:
        """What was asked for, unjudged: trained on all pairs, words weighted on all of them."""
        name = (MAFIN if self.weighting != "lambda" else LAMBDA) if self.augment is not None else WORDS
        joint = None if self.augment is None else self._fit(name, self.weighting, self.data.pairs)
        if self.lexical is None:
            return Selection(Form(name, self.black_dim, joint), None, self.fits)
        base = self.by_black if joint is None else self._scores(joint, torch.arange(len(self.data.queries)))
        assert self.by_words is not None
        values = self._weighed(base[self.labelled], self.by_words[self.labelled], self.labelled)
        name = name if joint is None else f"{name} + words"
        form = Form(name, self.black_dim, joint, self.lexical, _WEIGHTS[int(values.mean(1).argmax())])
        return Selection(form, None, self.fits)

    def _parts(self) -> list[tuple[Pairs, Int[Tensor, " query"]]]:
        """(pairs to learn from, queries to judge on): one split where that holds enough queries, else several folds."""
        pairs = self.data.pairs
        if self.dev is not None:
            held = torch.isin(pairs.query, self.dev.query)
            return [(pairs[(~held).nonzero().flatten()], self.dev.query.unique())]
        if _SHARE * len(self.labelled) >= _ENOUGH:
            training, held = split_by_passage(pairs, _SHARE, self.seed)
            return [(training, held.query.unique())]
        return [(training, held.query.unique()) for training, held in folds_by_passage(pairs, _FOLDS, self.seed)]

    def _judge(
        self, held: Int[Tensor, " query"], fold: Int[Tensor, " query"], trained: dict[str, Tensor]
    ) -> tuple[list[Candidate], dict[str, float]]:
        """Candidates from simple to complex with their values on `held` queries, and the weights of those that have one."""
        black, grades = self.by_black[held], self.grades[held]
        found, weights = [Candidate(BLACK, ndcg(black, grades).numpy())], {}
        small = 0 if self.augment is None else self.augment.dim
        words = 0 if self.lexical is None else self.lexical.dim

        def weighed(name: str, base: Tensor, other: Tensor, added: int) -> None:
            table = self._weighed(base, other, held)
            weights[name] = _WEIGHTS[int(table.mean(1).argmax())]
            found.append(Candidate(name, _cross_fitted(table, fold), added, f"weight {weights[name]:.2g}"))

        if self.by_words is not None:
            weighed(WORDS, black, self.by_words[held], words)
        if trained:
            for name in (CONCATENATION, FUSION, MAFIN, LAMBDA):
                if name == FUSION:
                    weighed(FUSION, black, trained[FUSION], small)
                else:
                    found.append(Candidate(name, ndcg(trained[name], grades).numpy(), small))
            if self.by_words is not None:
                weighed(MAFIN_WORDS, trained[MAFIN], self.by_words[held], small + words)
        if self.by_words is not None:
            alone = ndcg(self.by_words[held], grades).numpy()
            found.append(Candidate(BM25_ALONE, alone, note="not beside the black box", reference=True))
        return found, weights

    def _trained(self, parts: list[tuple[Pairs, Int[Tensor, " query"]]]) -> dict[str, Tensor]:
        """Scores of held queries over the corpus, [query, document], by every way to use the small model."""
        found: dict[str, list[Tensor]] = {}
        start = JointEncoder(self.augment, self.black_dim)
        for index, (pairs, held) in enumerate(parts):
            part = f"-{index}" if len(parts) > 1 else ""
            found.setdefault(CONCATENATION, []).append(self._scores(start, held))
            for name, weighting in self._weightings().items():
                joint = self._fit(name + part, weighting, pairs)
                found.setdefault(name, []).append(self._scores(joint, held))
        return {name: torch.cat(scores) for name, scores in found.items()}

    def _weightings(self) -> dict[str, str | float | int]:
        plain = "equal" if self.weighting == "lambda" else self.weighting
        return {FUSION: _ALONE, MAFIN: plain, LAMBDA: "lambda"}

    # ---- built

    def _built(self, name: str, weights: dict[str, float], parts: list[tuple[Pairs, Int[Tensor, " query"]]]) -> Form:
        """The chosen form, its small model trained on everything where folds were only for judging."""
        if name in (BLACK, WORDS):
            words = self.lexical if name == WORDS else None
            return Form(name, self.black_dim, None, words, weights.get(name, 0.0))
        if name == CONCATENATION:
            return Form(name, self.black_dim, JointEncoder(self.augment, self.black_dim).eval())
        trained = MAFIN if name == MAFIN_WORDS else name
        joint = self._fit(trained, self._weightings()[trained], parts[0][0] if len(parts) == 1 else self.data.pairs)
        if name == FUSION:
            # the score cos_b + w cos_t is that of a constant weighting sqrt w
            joint = JointEncoder(joint.augment, self.black_dim, math.sqrt(weights[name])).eval()
        words = self.lexical if name == MAFIN_WORDS else None
        return Form(name, self.black_dim, joint, words, weights[name] if words is not None else 0.0)

    def _fit(self, name: str, weighting: str | float | int, pairs: Pairs) -> JointEncoder:
        """A joint encoder trained from the start on `pairs`; each is trained once."""
        if name in self.fits:
            return self.fits[name].net  # type: ignore[return-value]
        joint = JointEncoder(copy.deepcopy(self.augment), self.black_dim, weighting)
        data = RankingData(
            self.data.queries, self.data.documents, self.data.query_vectors, self.data.document_vectors, pairs
        )
        folder = None if self.resume is None else self.resume / name.replace(" ", "-")
        self.fits[name] = fit_joint(joint, data, seed=self.seed, resume=folder, progress=self.progress, **self.options)
        return joint

    # ---- measured

    def _scores(self, joint: JointEncoder, queries: Int[Tensor, " query"]) -> Float[Tensor, "query document"]:
        device = next(joint.parameters()).device
        texts = [self.data.queries[int(index)] for index in queries]
        q = joint.encode(texts, self.data.query_vectors[queries].to(device), "query")
        d = joint.encode(self.data.documents, self.data.document_vectors.to(device), "document")
        return (q @ d.T).cpu()

    def _weighed(self, base: Tensor, other: Tensor, queries: Int[Tensor, " query"]) -> Float[Tensor, "weight query"]:
        """The criterion of each query for every weight of `other` beside `base`."""
        grades = self.grades[queries]
        return torch.stack([ndcg(base + weight * other, grades) for weight in _WEIGHTS])


def _cross_fitted(values: Float[Tensor, "weight query"], fold: Int[Tensor, " query"]) -> Float[np.ndarray, " query"]:
    """The value of each query at the weight that is best for the queries of all other folds."""
    found = torch.empty(values.shape[1], dtype=torch.float64)
    for index in fold.unique():
        inside = fold == index
        best = int(values[:, ~inside].mean(1).argmax()) if bool((~inside).any()) else len(values) // 2
        found[inside] = values[best, inside]
    return found.numpy()
