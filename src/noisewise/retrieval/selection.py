"""The candidates for the guard: each learned on some labelled queries and measured on others, weights included."""

import copy
import math
from dataclasses import dataclass, field, replace
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
from noisewise.retrieval.pairs import Pairs, first_copies, folds_by_passage, ndcg, split_by_passage
from noisewise.retrieval.vectors import KINDS

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
# queries that candidates are judged on, of more a random part
_MOST = 1000
# weights of words, and of a small model, beside what is there already
WEIGHTS = tuple(0.05 * 2 ** (i / 2) for i in range(20))
# weighting=w of a joint encoder that is its small part alone: the black box counts 1 / w^2
ALONE = 1e4

BLACK, WORDS, CONCATENATION, FUSION = "black box", "black box + words", "concatenation", "late fusion"
MAFIN, LAMBDA, MAFIN_WORDS, BM25_ALONE = "Mafin", "lambda-Mafin", "Mafin + words", "BM25"
FORMS = (BLACK, WORDS, CONCATENATION, FUSION, MAFIN, LAMBDA, MAFIN_WORDS)
# what is trained for a candidate
_TRAINED = {FUSION: FUSION, MAFIN: MAFIN, LAMBDA: LAMBDA, MAFIN_WORDS: MAFIN}


def check_form(name: str, augment: Any, lexical: LexicalBlock | None) -> int:
    """The numbers that a form adds. Raises `InvalidInput` for a name of no form, and for one whose parts are not there."""
    if name not in FORMS:
        raise InvalidInput(f"there is no form {name!r}; there are {', '.join(FORMS)}")
    small_missing = name not in (BLACK, WORDS) and augment is None
    if small_missing or (name in (WORDS, MAFIN_WORDS) and lexical is None):
        part = "trainable part" if small_missing else "LexicalBlock"
        raise InvalidInput(f"form {name!r} needs a {part} among the augments")
    words = lexical.dim if lexical is not None and name in (WORDS, MAFIN_WORDS) else 0
    return words + (0 if name in (BLACK, WORDS) else int(augment.dim))


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
    `resume`: a folder with one for each fit. `max_dim`: of a vector that may be chosen. `whole`: vectors of queries and
    documents by the black box where those in `data` are cut, for comparison.
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
    max_dim: int | None = None
    whole: tuple[Tensor, Tensor] | None = None
    fits: dict[str, RetrievalFit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.black_dim = self.data.document_vectors.shape[1]
        self.labelled = self.data.pairs.query.unique()
        self.copies = first_copies(self.data.documents)
        # copies of the augment read texts alike, so that they are read once for all of them
        self.features: dict[str, Any] = {}
        if self.augment is not None:
            self.features = {kind: self.augment.features(self.data.texts(kind), kind) for kind in KINDS}
        self.words_of_documents: Tensor | None = None
        if self.lexical is not None:
            self.words_of_documents = self.lexical.encode_document(self.data.documents)

    # ---- judged

    def select(self) -> Selection:
        """Judge all candidates, and build the one that the guard chose."""
        parts = self._parts()
        parts = [(pairs, self._some(held)) for pairs, held in parts]
        held = torch.cat([part for _, part in parts])
        fold = torch.cat([torch.full((len(part),), index) for index, (_, part) in enumerate(parts)])
        if len(parts) == 1:
            order = np.random.default_rng(self.seed).permutation(len(held))
            fold = torch.from_numpy(order % min(_FOLDS, len(held)))
        trained = self._trained(parts) if self.augment is not None else {}
        candidates, weights = self._judge(held, fold, trained)
        crossed = f"By {len(parts)}-fold cross-fitting, so that every labelled query counts."
        report = choose(candidates, len(self.labelled), notes=(crossed,) if len(parts) > 1 else ())
        pairs = parts[0][0] if len(parts) == 1 else self.data.pairs
        return Selection(self._built(report.choice, weights, pairs), report, self.fits)

    def build(self, name: str) -> Selection:
        """One candidate by its name, unjudged. A weight is chosen on queries that nothing was trained on."""
        pairs, held = self._parts()[0] if self.dev is not None else (self.data.pairs, self.labelled)
        if name in (FUSION, MAFIN_WORDS) and self.dev is None:
            pairs, held = self._split(pairs)
        held, trained, weights = self._some(self.labelled if name == WORDS else held), _TRAINED.get(name), {}
        joint = None if trained is None else self._fit(trained, self._weightings()[trained], pairs)
        small = None if joint is None or name in (MAFIN, LAMBDA) else self._scores(joint, held)
        black, words = self._by_black(held), self._by_words(held)
        beside = {WORDS: (black, words), FUSION: (black, small), MAFIN_WORDS: (small, words)}
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
            shared = torch.isin(self.copies[pairs.document], self.copies[self.dev.document])
            training = (~held & ~shared).nonzero().flatten()
            if self.augment is not None and not len(training):
                raise InvalidInput(
                    "dev leaves no pair to train on: of the others, each has a passage that dev has, too"
                )
            return [(pairs[training], self.dev.query.unique())]
        if self.augment is None:
            # nothing is trained, so every query may be judged on
            return [(pairs, self.labelled)]
        if _SHARE * len(self.labelled) >= _ENOUGH:
            return [self._split(pairs)]
        return [
            (training, held.query.unique())
            for training, held in folds_by_passage(pairs, _FOLDS, self.seed, self.copies)
        ]

    def _split(self, pairs: Pairs) -> tuple[Pairs, Int[Tensor, " query"]]:
        training, held = split_by_passage(pairs, _SHARE, self.seed, self.copies)
        return training, held.query.unique()

    def _judge(
        self, held: Int[Tensor, " query"], fold: Int[Tensor, " query"], trained: dict[str, Tensor]
    ) -> tuple[list[Candidate], dict[str, float]]:
        """Candidates from simple to complex with their values on `held` queries, and the weights of those that have one."""
        black, by_words, grades = self._by_black(held), self._by_words(held), self._grades(held)
        found, weights = [Candidate(BLACK, ndcg(black, grades).numpy())], {}
        small = 0 if self.augment is None else self.augment.dim
        words = 0 if self.lexical is None else self.lexical.dim

        def weighed(name: str, base: Tensor, other: Tensor, added: int) -> None:
            table = self._weighed(base, other, held)
            weights[name] = WEIGHTS[int(table.mean(1).argmax())]
            found.append(Candidate(name, _cross_fitted(table, fold), added, f"weight {weights[name]:.2g}"))

        if by_words is not None:
            weighed(WORDS, black, by_words, words)
            # nothing of it was trained, so queries that others learned from may say what the final weight is
            some = self._some(self.labelled)
            every = self._weighed(self._by_black(some), self._by_words(some), some)  # type: ignore[arg-type]
            weights[WORDS] = WEIGHTS[int(every.mean(1).argmax())]
        if trained:
            for name in (CONCATENATION, FUSION, MAFIN, LAMBDA):
                if name == FUSION:
                    weighed(FUSION, black, trained[FUSION], small)
                else:
                    found.append(Candidate(name, ndcg(trained[name], grades).numpy(), small))
            if by_words is not None:
                weighed(MAFIN_WORDS, trained[MAFIN], by_words, small + words)
        found = [self._fitting(candidate) for candidate in found]
        if self.whole is not None:
            full = ndcg(self.whole[0][held] @ self.whole[1].T, grades).numpy()
            found.append(Candidate(f"{BLACK}, all {self.whole[1].shape[1]} numbers", full, reference=True))
        if by_words is not None:
            alone = ndcg(by_words, grades).numpy()
            found.append(Candidate(BM25_ALONE, alone, note="not beside the black box", reference=True))
        return found, weights

    def _fitting(self, candidate: Candidate) -> Candidate:
        """Not to be chosen where its vector is too long."""
        if self.max_dim is None or self.black_dim + candidate.added <= self.max_dim:
            return candidate
        return replace(candidate, reference=True, note=f"more than {self.max_dim} numbers")

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
        data = replace(self.data, pairs=pairs, features=self.features, known=self.data.pairs)
        folder = None if self.resume is None else self.resume / name.replace(" ", "-")
        fit = fit_joint(joint, data, seed=self.seed, resume=folder, progress=self.progress, **self.options)
        if fit.interrupted:
            # half a training must not be judged; with a folder, the same call goes on
            raise KeyboardInterrupt
        self.fits[name] = fit
        return joint

    # ---- measured

    def _some(self, queries: Int[Tensor, " query"]) -> Int[Tensor, " judged"]:
        """All of them, or as many as are enough to judge by: scores over a whole corpus are large."""
        if len(queries) <= _MOST:
            return queries
        order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(self.seed))
        return queries[order[:_MOST].sort().values]

    def _by_black(self, queries: Int[Tensor, " query"]) -> Float[Tensor, "query document"]:
        return self.data.query_vectors[queries] @ self.data.document_vectors.T

    def _by_words(self, queries: Int[Tensor, " query"]) -> Float[Tensor, "query document"] | None:
        if self.lexical is None or self.words_of_documents is None:
            return None
        return self.lexical.encode_query(self._texts(queries)) @ self.words_of_documents.T

    def _grades(self, queries: Int[Tensor, " query"]) -> Float[Tensor, "query document"]:
        return self.data.pairs.grades(queries, torch.arange(len(self.data.documents)))

    def _texts(self, queries: Int[Tensor, " query"]) -> list[str]:
        return [self.data.queries[int(index)] for index in queries]

    def _scores(self, joint: JointEncoder, queries: Int[Tensor, " query"]) -> Float[Tensor, "query document"]:
        device = next(joint.parameters()).device
        asked, documents = self.features["query"][queries], self.features["document"]
        q = joint.encode(self._texts(queries), self.data.query_vectors[queries].to(device), "query", features=asked)
        d = joint.encode(self.data.documents, self.data.document_vectors.to(device), "document", features=documents)
        return (q @ d.T).cpu()

    def _weighed(self, base: Tensor, other: Tensor, queries: Int[Tensor, " query"]) -> Float[Tensor, "weight query"]:
        """The criterion of each query for every weight of `other` beside `base`."""
        grades = self._grades(queries)
        return torch.stack([ndcg(base + weight * other, grades) for weight in WEIGHTS])


def _cross_fitted(values: Float[Tensor, "weight query"], fold: Int[Tensor, " query"]) -> Float[np.ndarray, " query"]:
    """The value of each query at the weight that is best for the queries of all other folds."""
    found = torch.empty(values.shape[1], dtype=torch.float64)
    for index in fold.unique():
        inside = fold == index
        best = int(values[:, ~inside].mean(1).argmax()) if bool((~inside).any()) else len(values) // 2
        found[inside] = values[best, inside]
    return found.numpy()
