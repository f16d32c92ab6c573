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

from noisewise.errors import InvalidInput
from noisewise.retrieval.fitting import RankingData, RetrievalFit, fit_joint
from noisewise.retrieval.forms import Form
from noisewise.retrieval.guard import Candidate, GuardReport, choose
from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.lexical import LexicalBlock
from noisewise.retrieval.pairs import Pairs, folds_by_passage, ndcg, split_by_passage

__all__ = [
    "ALONE",
    "BLACK",
    "CONCATENATION",
    "FORMS",
    "FUSION",
    "LAMBDA",
    "MAFIN",
    "MAFIN_WORDS",
    "WEIGHTS",
    "WORDS",
    "Selection",
    "Selector",
    "check_form",
]

# a share of labelled queries smaller than this, and every one of them is judged on by cross-fitting
_ENOUGH, _SHARE, _FOLDS = 50, 0.2, 5
# weights of words, and of a small model, beside what is there already
WEIGHTS = tuple(0.05 * 2 ** (i / 2) for i in range(20))
# weighting=w of a joint encoder that is its small part alone: the black box counts 1 / w^2
ALONE = 1e4

BLACK, WORDS, CONCATENATION, FUSION = "black box", "black box + words", "concatenation", "late fusion"
MAFIN, LAMBDA, MAFIN_WORDS, BM25ALONE = "Mafin", "lambda-Mafin", "Mafin + words", "BM25"
FORMS = (BLACK, WORDS, CONCATENATION, FUSION, MAFIN, LAMBDA, MAFIN_WORDS)
# what is trained for a candidate
_TRAINED = {FUSION: FUSION, MAFIN: MAFIN, LAMBDA: LAMBDA, MAFIN_WORDS: MAFIN}


def check_form(name: str, augment: Any, lexical: LexicalBlock | None) -> None:
    """Raise `InvalidInput` for a name of no form, and for one whose parts are not there."""
    if name not in FORMS:
        raise InvalidInput(f"there is no form {name!r}; there are {', '.join(FORMS)}")
    small_missing = name not in (BLACK, WORDS) and augment is None
    if small_missing or (name in (WORDS, MAFIN_WORDS) and lexical is None):
        part = "trainable part" if small_missing else "LexicalBlock"
        raise InvalidInput(f"form {name!r} needs a {part} among the augments")


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
        pairs = parts[0][0] if len(parts) == 1 else self.data.pairs
        return Selection(self._built(report.choice, weights, pairs), report, self.fits)

    def build(self, name: str) -> Selection:
        """One candidate by its name, unjudged. Its weight is chosen on held-out queries."""
        pairs, held = self._split(self.data.pairs) if self.dev is None else self._parts()[0]
        trained, weights = _TRAINED.get(name), {}
        small = None if trained is None else self._scores(self._fit(trained, self._weightings()[trained], pairs), held)
        words = None if self.by_words is None else self.by_words[held]
        beside = {
            WORDS: (self.by_black[held], words), FUSION: (self.by_black[held], small), MAFIN_WORDS: (small, words)
        }  # fmt: skip
        if name in beside:
            base, other = beside[name]
            assert base is not None
            assert other is not None
            weights[name] = WEIGHTS[int(self._weighed(base, other, held).mean(1).argmax())]
        return Selection(self._built(name, weights, pairs), None, self.fits)

    def _parts(self) -> list[tuple[Pairs, Int[Tensor, " query"]]]:
        """(pairs to learn from, queries to judge on): one split where that holds enough queries, else several folds."""
        pairs = self.data.pairs
        if self.dev is not None:
            held = torch.isin(pairs.query, self.dev.query)
            return [(pairs[(~held).nonzero().flatten()], self.dev.query.unique())]
        if _SHARE * len(self.labelled) >= _ENOUGH:
            return [self._split(pairs)]
        return [(training, held.query.unique()) for training, held in folds_by_passage(pairs, _FOLDS, self.seed)]

    def _split(self, pairs: Pairs) -> tuple[Pairs, Int[Tensor, " query"]]:
        training, held = split_by_passage(pairs, _SHARE, self.seed)
        return training, held.query.unique()

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
            weights[name] = WEIGHTS[int(table.mean(1).argmax())]
            found.append(Candidate(name, _cross_fitted(table, fold), added, f"weight {weights[name]:.2g}"))

        if self.by_words is not None:
            weighed(WORDS, black, self.by_words[held], words)
            # nothing of it was trained, so every labelled query may say what the final weight is
            every = self._weighed(self.by_black[self.labelled], self.by_words[self.labelled], self.labelled)
            weights[WORDS] = WEIGHTS[int(every.mean(1).argmax())]
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
            found.append(Candidate(BM25ALONE, alone, note="not beside the black box", reference=True))
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
        return {FUSION: ALONE, MAFIN: plain, LAMBDA: "lambda"}

    # ---- built

    def _built(self, name: str, weights: dict[str, float], pairs: Pairs) -> Form:
        """The form of that name, its small model trained on `pairs`."""
        if name in (BLACK, WORDS):
            words = self.lexical if name == WORDS else None
            return Form(name, self.black_dim, None, words, weights.get(name, 0.0))
        if name == CONCATENATION:
            return Form(name, self.black_dim, JointEncoder(self.augment, self.black_dim).eval())
        trained = _TRAINED[name]
        joint = self._fit(trained, self._weightings()[trained], pairs)
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
        return torch.stack([ndcg(base + weight * other, grades) for weight in WEIGHTS])


def _cross_fitted(values: Float[Tensor, "weight query"], fold: Int[Tensor, " query"]) -> Float[np.ndarray, " query"]:
    """The value of each query at the weight that is best for the queries of all other folds."""
    found = torch.empty(values.shape[1], dtype=torch.float64)
    for index in fold.unique():
        inside = fold == index
        best = int(values[:, ~inside].mean(1).argmax()) if bool((~inside).any()) else len(values) // 2
        found[inside] = values[best, inside]
    return found.numpy()
