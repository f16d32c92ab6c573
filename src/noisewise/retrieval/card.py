"""The model card of a `Mafin`: what it stands on, what was chosen and why, and the lines that load it."""

from typing import Any

from noisewise.retrieval.guard import GuardReport

__all__ = ["model_card"]


def model_card(config: dict[str, Any], dim: int) -> str:
    """Markdown, of the configuration that `Mafin.save_pretrained` writes."""
    box = config["black_box"]
    judged = "Nothing was measured: this form was asked for by its name."
    if config["report"] is not None:
        judged = f"```\n{GuardReport.from_dict(config['report'])}\n```"
    helped = "" if config["choice"] == "black box" else ", and what was found to help it"
    identity = "\n".join(f"| {name} | {value} |" for name, value in box.items() if value is not None)
    return f"""---
library_name: noisewise
tags: [retrieval, sentence-similarity]
---

# {config["choice"]} on {box.get("model")}

Unit vectors of {dim} numbers for search by cosine: those of the black box below{helped}.

| black box | |
|---|---|
{identity}

```python
from noisewise.retrieval import Mafin

model = Mafin.from_pretrained("this/folder", black_box=..., cache="vectors.sqlite")
scores = model.similarity(model.encode_query(["a question"]), model.encode_document(["a passage"]))
```

Vectors of any other model do not fit: the folder holds a fingerprint, and is not loaded where the model has changed.

## Why this form

{judged}
"""
