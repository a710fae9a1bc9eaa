"""The MPMA model, in the conventions of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoProcessor,
)

from mpma_train.models.configuration_mpma import MpmaConfig
from mpma_train.models.modeling_mpma import MpmaForPreTraining, MpmaModel
from mpma_train.models.outputs import (
    FusedFeatures,
    ImageFeatures,
    MpmaForPreTrainingOutput,
    TextFeatures,
)
from mpma_train.models.processing_mpma import MpmaImageProcessor, MpmaProcessor

AutoConfig.register(MpmaConfig.model_type, MpmaConfig)
AutoModel.register(MpmaConfig, MpmaModel)
AutoModelForPreTraining.register(MpmaConfig, MpmaForPreTraining)
AutoProcessor.register(MpmaConfig, MpmaProcessor)

__all__ = [
    "FusedFeatures",
    "ImageFeatures",
    "MpmaConfig",
    "MpmaForPreTraining",
    "MpmaForPreTrainingOutput",
    "MpmaImageProcessor",
    "MpmaModel",
    "MpmaProcessor",
    "TextFeatures",
]
