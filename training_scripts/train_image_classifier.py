"""Train an image classifier with any of the package's optimizers, through Trainer.

    python training_scripts/train_image_classifier.py --model_name vit-tiny --num_train_epochs 25 --output_dir runs/digits
    python training_scripts/train_image_classifier.py --recipe agr-cifar100 --output_dir runs/cifar100
    torchrun --nproc_per_node 2 training_scripts/train_image_classifier.py --recipe adal-cifar10 --output_dir runs/adal

A recipe's batch is that of all processes together; --per_device_train_batch_size is of one.
`--optim` takes agr_hf.list_optimizers() and Trainer's own names. The default data need no network.
"""

import logging
from dataclasses import dataclass, field

from agr_hf.integrations.callbacks import GradientScaleCheck
from agr_hf.tasks.classifiers import classifier, parameter_count
from agr_hf.tasks.images import classification_metrics, hub_source, load_images
from agr_hf.tasks.recipes import IMAGE_RECIPES
from agr_hf.tasks.runs import describe_dataset, run_main
from agr_hf.tasks.trainer_run import TrainerRun, trainer_parser

logger = logging.getLogger("train_image_classifier")


@dataclass
class ModelArguments:
    model_name: str = field(default="vit-tiny", metadata={"help": "resnet18, vit-tiny, swin-t, ... or any timm name"})


@dataclass
class DataArguments:
    dataset_name: str = field(default="digits", metadata={"help": "digits, cifar10, cifar100, tiny-imagenet, "
                              "fashion-mnist, mnist, a folder of images, or a Hub id"})  # fmt: skip
    train_file: str | None = field(default=None, metadata={"help": "parquet file in the place of the Hub"})
    test_file: str | None = field(default=None, metadata={"help": "parquet file in the place of the Hub"})
    image_size: int | None = field(default=None, metadata={"help": "height and width; default: the data set's own"})
    augmentation: str = field(default="none", metadata={"help": "none, flip-crop or rand-augment"})
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


def make_parser():
    return trainer_parser(__doc__, ModelArguments, DataArguments, recipes=IMAGE_RECIPES,
                          per_device_train_batch_size=64, save_strategy="epoch")  # fmt: skip


def main(argv=None):
    run = TrainerRun(__file__, make_parser(), argv)
    model_args, data_args = run.own

    data = load_images(data_args.dataset_name, data_args.train_file, data_args.test_file, data_args.augmentation,
                       data_args.max_train_samples, data_args.max_eval_samples, data_args.image_size,
                       run.data_seed)  # fmt: skip
    logger.info("%s training and %s test images of %d x %d, %d classes", f"{len(data.train):,}", f"{len(data.test):,}",
                data.size, data.size, len(data.labels))  # fmt: skip
    model = classifier(model_args.model_name, data.size, data.channels, data.labels, data.mean, data.std)
    logger.info("%s: %s parameters", model_args.model_name, f"{parameter_count(model):,}")

    metrics = run.train(model, data.train, data.test, classification_metrics, callbacks=[GradientScaleCheck()])
    logger.info("test accuracy %.2f%%, test loss %.4f", 100 * metrics["accuracy"], metrics["loss"])

    dataset = describe_dataset(
        data_args.dataset_name,
        len(data.train),
        (data_args.train_file, data_args.test_file),
        hub_source(data_args.dataset_name),
        split=data.test_split,
        evaluated=len(data.test),
        complete=len(data.test) == data.test_rows,
    )
    run.finish("image-classification", metrics, dataset, channels=data.channels)
    return metrics


if __name__ == "__main__":
    run_main(main)
