"""The model card of a `Mafin`: what it stands on, what was chosen and why, and the lines that load it."""

import json
from typing import Any

from noisewise.retrieval.guard import GuardReport

__all__ = ["model_card"]


def model_card(config: dict[str, Any], dim: int) -> str:
    """Markdown, of the configuration that `Mafin.save_pretrained` writes."""
    box = config["black_box"]
    judged = "Nothing was judged: this form was asked for (`guard=False`)."
    if config["report"] is not None:
        judged = f"```\n{GuardReport.from_dict(config['report'])}\n```"
    return f"""---
library_name: noisewise
tags: [retrieval, sentence-similarity]
---

# {config["choice"]} on {box.get("model")}

Unit vectors of {dim} numbers for search by cosine: those of the black box `{json.dumps(box)}` and what was found to help it.

```python
from noisewise.retrieval import Mafin

model = Mafin.from_pretrained("this/folder", black_box=..., cache="vectors.sqlite")
scores = model.similarity(model.encode_query(["a question"]), model.encode_document(["a passage"]))
```

## Chosen on labelled queries

{judged}
"""
