"""The names that `_target_` may hold: what pipelines are made of, and nothing that is a way in.

Left out on purpose, since a config could run code of its choice or fetch something through them:

    LoadImage(d)          `reader` names any class by dotted path; our own steps load the files
    PatchInferer          `merger_cls` does
    Lambda*, *TorchVision*, *TorchIO*, *CuCIM*
                          take a function, or the name of one
    LambdaLR, MultiplicativeLR
                          take a function
    PersistentDataset and its kin, NPZDictItemDataset, NumpyReader
                          unpickle what they find
    DecathlonDataset, DenseNet121, PerceptualLoss and the like
                          download
    ProbMapProducer, MLFlowHandler, ClearMLHandler, TrtHandler
                          reach for other services and compilers
    LogfileHandler        writes lines of the config's choice under any name
    monai.bundle, torch.hub, torch.load, torch.jit, torch.utils.collect_env
                          run what they are given

`FORBIDDEN` holds single arguments of allowed classes for the same reason. `MEMBERS` holds what
expressions may ask of an object: nothing that could be called to do more than the config itself.
"""

from __future__ import annotations

import pydoc
from collections.abc import Collection
from functools import cache
from importlib import import_module
from typing import Any

from monai.bundle import ConfigComponent

OURS = {
    "networks.dense_unet": "DenseUNet",
    "pipeline.data.cache": "CachedDataset CaseSampler VolumeCache",
    "pipeline.data.input_images": "list_images",
    "pipeline.data.data_module": "DataModule",
    "pipeline.data.plan": "Plan",
    "pipeline.data.sampling": "EpochSampler PatchDataset PatchLoader",
    "pipeline.lifecycle.lifecycle": "Lifecycle",
    "pipeline.precision": "Precision resolve_device",
    "pipeline.prediction.predict_files": "Prediction",
    "pipeline.evaluation.metrics": "MeanDice",
    "pipeline.prediction.segmenter": "Segmenter SlidingWindowLabels",
    "pipeline.prediction.sliding_window": "SlidingWindow",
    "pipeline.prediction.predictor": "load_networks",
    "pipeline.process_group": "ProcessGroup",
    "pipeline.evaluation.final_scores": "Scoring",
    "pipeline.training.checkpoint": "CheckpointHandler",
    "pipeline.training.evaluator": "EvaluationLog MixedPrecisionEvaluator",
    "pipeline.training.logging_handlers": "ConsoleHandler ScoreHandler TensorBoardHandler",
    "pipeline.training.loss": "SegmentationLoss",
    "pipeline.training.schedule": "warmup_cosine",
    "pipeline.training.flight_recorder": "FlightRecorder",
    "pipeline.training.trainer": "MixedPrecisionTrainer",
    "pipeline.lifecycle.read_only_run": "ReadOnlyRun",
    "transforms.augment": "Augment",
    "transforms.cleanup": "Cleanup",
    "transforms.postprocess": "ToOriginalGridd",
    "transforms.preprocess": "ValidationPreprocessing preprocessing",
}
MONAI = {  # by their bare name too
    "monai.data": "CacheDataset DataLoader Dataset SmartCacheDataset ThreadDataLoader",
    "monai.engines": "SupervisedEvaluator SupervisedTrainer",
    "monai.handlers": """
        CheckpointLoader CheckpointSaver ConfusionMatrix DecollateBatch EarlyStopHandler
        GarbageCollector HausdorffDistance IgniteMetricHandler LrScheduleHandler MeanAbsoluteError
        MeanDice MeanIoUHandler MeanSquaredError MetricLogger MetricsSaver
        PanopticQuality PeakSignalToNoiseRatio PostProcessing ROCAUC RootMeanSquaredError
        SmartCacheHandler StatsHandler SurfaceDistance TensorBoardImageHandler
        TensorBoardStatsHandler ValidationHandler""",
    "monai.inferers": """
        SimpleInferer SliceInferer SlidingWindowInferer SlidingWindowInfererAdapt""",
    "monai.losses": """
        AsymmetricUnifiedFocalLoss DeepSupervisionLoss DiceCELoss DiceFocalLoss DiceLoss FocalLoss
        GeneralizedDiceFocalLoss GeneralizedDiceLoss GeneralizedWassersteinDiceLoss HausdorffDTLoss
        LogHausdorffDTLoss MaskedDiceLoss NACLLoss SoftDiceclDiceLoss SoftclDiceLoss SSIMLoss
        TverskyLoss""",
    "monai.metrics": """
        ConfusionMatrixMetric DiceMetric FBetaScore GeneralizedDiceScore HausdorffDistanceMetric
        LossMetric MAEMetric MSEMetric MeanIoU PSNRMetric PanopticQualityMetric RMSEMetric
        ROCAUCMetric SSIMMetric SurfaceDiceMetric SurfaceDistanceMetric""",
    "monai.networks.nets": """
        AttentionUnet BasicUNet BasicUNetPlusPlus DynUNet HighResNet MedNeXt SegResNet SegResNetDS
        SegResNetDS2 SegResNetVAE SwinUNETR UNETR UNet VNet""",
    "monai.optimizers": "Novograd WarmupCosineSchedule",
    "monai.transforms": """
        Activationsd AddCoordinateChannelsd AdjustContrastd Affined AsChannelLastd AsDiscreted
        BorderPadd BoundingRectd CastToTyped CenterScaleCropd CenterSpatialCropd ClassesToIndicesd
        ClipIntensityPercentilesd Compose ConcatItemsd CopyItemsd CropForegroundd DataStatsd
        Decollated DeleteItemsd DistanceTransformEDTd DivisiblePadd EnsureChannelFirstd EnsureTyped
        FgBgToIndicesd FillHolesd FlattenSubKeysd Flipd ForegroundMaskd FromMetaTensord
        GaussianSharpend GaussianSmoothd GibbsNoised GridDistortiond HistogramNormalized Identityd
        IntensityStatsd Invertd KSpaceSpikeNoised KeepLargestConnectedComponentd LabelFilterd
        LabelToContourd LabelToMaskd MapLabelValued MaskIntensityd MeanEnsembled MedianSmoothd
        NormalizeIntensityd OneOf Orientationd RandAdjustContrastd RandAffined RandAxisFlipd
        RandBiasFieldd RandCoarseDropoutd RandCoarseShuffled RandCropByLabelClassesd
        RandCropByPosNegLabeld RandFlipd RandGaussianNoised RandGaussianSharpend
        RandGaussianSmoothd RandGibbsNoised RandGridDistortiond RandHistogramShiftd
        RandKSpaceSpikeNoised RandRicianNoised RandRotate90d RandRotated RandScaleCropd
        RandScaleIntensityFixedMeand RandScaleIntensityd RandShiftIntensityd
        RandSimulateLowResolutiond RandSmoothFieldAdjustContrastd RandSmoothFieldAdjustIntensityd
        RandSpatialCropSamplesd RandSpatialCropd RandStdShiftIntensityd RandWeightedCropd RandZoomd
        RandomOrder RemoveRepeatedChanneld RemoveSmallObjectsd RepeatChanneld ResampleToMatchd
        ResizeWithPadOrCropd Resized Rotate90d Rotated SaveImaged ScaleIntensityRangePercentilesd
        ScaleIntensityRanged ScaleIntensityd SelectItemsd ShiftIntensityd SobelGradientsd SomeOf
        Spacingd SpatialCropd SpatialPadd SpatialResampled SplitDimd SqueezeDimd
        StdShiftIntensityd ThresholdIntensityd ToDeviced ToMetaTensord ToTensord Transposed
        VoteEnsembled Zoomd""",
}
OTHERS = {
    "ignite.handlers": "EMAHandler",
    "ignite.metrics": "Accuracy Average Loss Precision Recall RunningAverage",
    "torch.nn": "BCEWithLogitsLoss CrossEntropyLoss L1Loss MSELoss SmoothL1Loss",
    "torch.optim": """
        ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD""",
    "torch.optim.lr_scheduler": """
        ChainedScheduler ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR
        ExponentialLR LinearLR MultiStepLR OneCycleLR PolynomialLR ReduceLROnPlateau SequentialLR
        StepLR""",
    "torch.utils.data": "BatchSampler DataLoader RandomSampler SequentialSampler",
}
COMPILE = {
    "compile": ("", "its compiler runs programs that the config names"),
    "compile_kwargs": ("", "they name programs that the compiler runs"),
}
LOG_DIR = {"log_dir": (r"(?!.*://).*", "what is behind :// would be fetched or sent")}
TORCH_FILE = (r".*\.pt", "a file that is not named *.pt may be one that Python executes")
# by class, arguments that are nothing or text of a pattern, and why
FORBIDDEN = {
    "CheckpointSaver": {"final_filename": TORCH_FILE, "key_metric_filename": TORCH_FILE},
    "MixedPrecisionEvaluator": COMPILE,
    "MixedPrecisionTrainer": {"compile_kwargs": COMPILE["compile_kwargs"]},
    "SaveImaged": {"writer": ("", "it names any class by dotted path")},
    "StatsHandler": {
        "key_var_format": (r"([^{}]|{(:[^{}]*)?})*", "it could print what is inside of objects")
    },
    "SupervisedEvaluator": COMPILE,
    "SupervisedTrainer": COMPILE,
    "TensorBoardImageHandler": LOG_DIR,
    "TensorBoardStatsHandler": LOG_DIR,
}
# by class, the attributes and methods that expressions may ask for, with the class of their values
# where more may be asked of it
_LIFECYCLE = """
    cache_dir:Path cases:Cases checkpoint:Path enter() initial_weights is_held leave() lost
    plan:Plan recipe run_dir:Path start.tensors"""  # the last one in configs of older runs
_NETWORK = "named_parameters() parameters() state_dict()"
MEMBERS = {
    name: dict(word.partition(":")[::2] for word in words.split())
    for name, words in {
        "Augment": "input_size",
        "Cases": "test train validation",
        "EpochSampler": "samples_per_epoch",
        "Lifecycle": _LIFECYCLE,
        "MixedPrecisionEvaluator": "run()",
        "MixedPrecisionTrainer": "run()",
        "Module": _NETWORK,
        "Plan": """
            batch_size class_names crop_empty_borders flip_axes foreground_ratio ignore_value
            in_channels normalization num_classes roi_size spacing strides""",
        "Precision": "device place():Module",
        "Prediction": "run()",
        "ProcessGroup": "replica()",
        "Scoring": "run()",
        "SupervisedEvaluator": "run()",
        "SupervisedTrainer": "run()",
        "ReadOnlyRun": _LIFECYCLE + " best_model:Path",
        **dict.fromkeys(["DenseUNet", *MONAI["monai.networks.nets"].split()], _NETWORK),
    }.items()
}
ANY = "*"  # stands for the classes of the user's own, of which anything may be asked
MEMBERS[ANY] = {asked: kind for known in MEMBERS.values() for asked, kind in known.items()}


def _names(table: dict[str, str]) -> dict[str, str]:
    """Dotted name to module."""
    return {f"{module}.{name}": module for module, names in table.items() for name in names.split()}


DOTTED = _names(OURS) | _names(MONAI) | _names(OTHERS)
BARE = {full.rpartition(".")[2]: full for full in _names(MONAI)}


def names(allow: Collection[str] = ()) -> list[str]:
    """Every name that may stand as `_target_`.

    Args:
        allow: Dotted names that the user allows beside the list.
    """
    return [*DOTTED, *BARE, *allow]


def is_allowed(name: str, allow: Collection[str] = ()) -> bool:
    """Whether `name` is on the list, in `allow`, or a listed class under its defining module."""
    if name in DOTTED or name in BARE or name in allow:
        return True
    module, _, last = name.rpartition(".")
    listed = BARE.get(last)  # monai.losses.dice.DiceLoss is monai.losses.DiceLoss
    if listed is None or not module.startswith(DOTTED[listed] + "."):
        return False
    return getattr(_locate(listed), "__module__", None) == module


def find(name: str) -> Any:
    """The class or function of a name; `None` if there is none.

    Importing is executing: only for names that are allowed, or in a config that is executed anyway.
    """
    if name in BARE or "." in name:
        return _locate(BARE.get(name, name))
    return _locate(ConfigComponent({"_target_": name}).resolve_module_name())


@cache
def _locate(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    if DOTTED.get(dotted) == module:
        return getattr(import_module(module), name, None)
    try:
        return pydoc.locate(dotted)  # as MONAI does
    except pydoc.ErrorDuringImport:
        return None
