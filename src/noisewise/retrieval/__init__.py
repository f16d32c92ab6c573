"""Better search on an embedding that cannot be trained: a small vector beside it, in one cosine, chosen by what was measured."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "beir": ["load_beir", "text_of"],
        "blackbox": ["CachedBlackBox", "as_black_box"],
        "bm25": ["BM25"],
        "chat": ["ChatEndpoint"],
        "cache": ["EmbeddingCache"],
        "distillation": ["distil_bm25"],
        "encoder": ["SentenceEncoder"],
        "endpoint": ["OpenAICompatible"],
        "evaluation": ["evaluate", "exact_run", "paired_bootstrap"],
        "fitting": ["RankingData", "fit_joint"],
        "joint": ["JointEncoder"],
        "lexical": ["LexicalBlock"],
        "mafin": ["Mafin"],
        "pairs": ["Pairs"],
        "synthesis": ["estimate_synthesis", "synthesize"],
        "table": ["WordPieceTable"],
    },
)
