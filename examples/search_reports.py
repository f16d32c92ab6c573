"""Better search on an embedding that cannot be trained: fit, read the guard's table, keep, load, and search another corpus.

Questions about one company's annual report are learned from; another company's report is searched, whose words are learned
without labels. The embedding stands in for yours, which may be any function from texts to vectors: it hashes letter triples,
which is poor, so that the gain here says nothing about the gain over a good one.
"""

import zlib
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import rich
from rich.table import Table

from noisewise.retrieval import CachedBlackBox, Mafin, evaluate, load_beir
from noisewise.retrieval.beir import text_of
from noisewise.retrieval.evaluation import Evaluation, exact_run

DIM = 128
REPORTS = Path(str(files("noisewise"))) / "data"


def embed(texts: list[str]) -> np.ndarray:
    """Vectors of texts, (text, DIM): what your endpoint would do."""
    vectors = np.zeros((len(texts), DIM))
    for row, text in enumerate(texts):
        padded = f" {text.lower()} "
        for start in range(len(padded) - 2):
            code = zlib.crc32(padded[start : start + 3].encode())
            vectors[row, code % DIM] += 1 if code & 2**20 else -1
    return vectors


def report(name: str, split: str, passages: int) -> tuple[dict, dict, dict]:
    """The first passages of a report, all its questions, and judgements of those that these passages answer."""
    corpus, queries, qrels = load_beir(REPORTS / name)
    kept = dict(list(corpus.items())[:passages])
    return kept, queries, {query: judged for query, judged in qrels[split].items() if judged.keys() <= kept.keys()}


def main(folder: str | Path, passages: int = 60, epochs: float = 2) -> tuple[Mafin, dict[str, Evaluation]]:
    """The model as loaded from `folder`, and how well the embedding alone and the model find the other report's passages."""
    folder = Path(folder)
    corpus, queries, qrels = report("tenk-lyft", "train", passages)
    searched, questions, truth = report("tenk-uber", "test", passages)
    cache = folder / "vectors.sqlite"

    fitted = Mafin(embed, cache=cache).fit(corpus, queries, qrels, search=searched, epochs=epochs)
    print(fitted.report_)
    fitted.save_pretrained(folder / "model")

    # as another process would: the folder, and the function under its name
    model = Mafin.from_pretrained(folder / "model", embed, cache=cache)
    names, texts = list(searched), [text_of(passage) for passage in searched.values()]
    index = model.encode_document(texts)  # for any store that ranks by cosine
    for query in list(truth)[:2]:
        print(f"\n{questions[query]}")
        scores = model.similarity(model.encode_query(questions[query]), index)[0]
        for place in scores.argsort(descending=True)[:3].tolist():
            mark = "right" if names[place] in truth[query] else ""
            print(f"  {scores[place]:.3f} {mark:5} {' '.join(texts[place].split())[:80]}")

    asked, box = [questions[query] for query in truth], CachedBlackBox(embed, cache)
    vectors = {
        "the embedding alone": (box.vectors(asked, "query"), box.vectors(texts, "document")),
        model.choice_: (model.encode_query(asked), index),
    }
    found = {
        name: evaluate(truth, exact_run(list(truth), q, names, d), ("nDCG@10", "R@10"))
        for name, (q, d) in vectors.items()
    }
    table = Table(
        "searched by", "nDCG@10", "R@10", title=f"\nthe other report: {len(truth)} questions, {len(texts)} passages"
    )
    for name, one in found.items():
        table.add_row(name, *map(str, one.mean.values()))
    rich.print(table)
    return model, found


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        main(scratch)
