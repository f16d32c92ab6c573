"""Long convolutions for long signals: MRConv, exact and cheap in training, one kernel in use, and a stream."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["listops"],
    submod_attrs={
        "block": ["MRConvBlock", "merge_layers", "parameter_groups"],
        "convolution": ["long_conv"],
        "export": ["export_onnx", "export_program"],
        "estimator": ["SequenceClassifier", "SequenceRegressor"],
        "fitting": ["SequenceFit", "fit_sequence", "recalibrate"],
        "images": ["ImageMRConv", "swap_layers"],
        "layer": ["MRConv"],
        "merged": ["LongConv"],
        "model": ["SequenceModel"],
        "pictures": ["kernel_report"],
    },
)
