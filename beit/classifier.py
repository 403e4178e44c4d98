"""A trained network for use from Python: images in, class names and probabilities out."""

import os
from typing import Any, Sequence, Union

import torch
from PIL import Image

from beit.checkpoint.inference_model import LoadedModel, load_for_inference
from beit.data.decode import UnreadableImage, load_image, to_rgb
from beit.devices import accelerator
from beit.errors import UserError
from beit.training.metrics import top_classes

Picture = Union[str, 'os.PathLike[str]', Image.Image]


class Classifier:
    """A network with everything that it needs to classify images.

    Attributes:
        model (torch.nn.Module): in evaluation mode; float32 images (B, 3, H, W) to logits (B, classes).
        spec (beit.model_spec.ModelSpec): architecture, preprocessing, class names and kind of output.
        classes (list of str): the class names, in the order of the logits.
        source (str): the file that holds the weights.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device) -> None:
        self.model, self.device = loaded.model.to(device), device
        self.spec, self.classes, self.source = loaded.spec, loaded.classes, loaded.source

    def transform(self, image: Picture) -> torch.Tensor:
        """Prepare a file, or a Pillow image of any mode and size, as the evaluation does: float32 (C, H, W) on the CPU.

        Raises `beit.errors.UserError` for a file that can't be read as an image, and ValueError for a Pillow image
        that holds numbers of unknown range.
        """
        if not isinstance(image, (str, os.PathLike, Image.Image)):
            raise TypeError('give a path or a Pillow image, not %s; PIL.Image.fromarray makes one of an array'
                            % type(image).__name__)
        evaluation = self.spec.preprocessing
        reading = evaluation.reading
        try:
            image = to_rgb(image, reading) if isinstance(image, Image.Image) else load_image(os.fspath(image), reading)
        except UnreadableImage as error:  # its text advises flags of the programs
            raise UserError('%s: cannot be read as an image (%s)' % (error.path, error.reason)) from None
        if not evaluation.resizes and not evaluation.fits(*image.size):
            image = evaluation.resize_and_crop()(image)
        pixels = evaluation.build()(image).permute(2, 0, 1).float()
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (evaluation.mean, evaluation.std))
        return pixels.div_(255).sub_(mean).div_(std)

    @torch.no_grad()
    def probabilities(self, images: Sequence[Picture]) -> torch.Tensor:
        """Float32 (images, classes) on the CPU: softmax, or sigmoid where images have several labels."""
        batch = torch.stack([self.transform(image) for image in images])
        logits = self.model(batch.to(self.device)).float()
        return (logits.sigmoid() if self.spec.activation == 'sigmoid' else logits.softmax(-1)).cpu()

    def predict(self, image: Union[Picture, Sequence[Picture]], top_k: int = 5) -> Any:
        """Classify an image, or a list of images in one batch.

        Returns [(class name, probability), …], the most likely first; for a list of images, a list of these. Raises
        what `transform` raises.
        """
        if not isinstance(image, (list, tuple)):
            single: Any = image
            return self.predict([single], top_k)[0]
        if not image:
            return []
        probabilities = self.probabilities(image)
        return [[(self.classes[index], row[index].item()) for index in best.tolist()]
                for row, best in zip(probabilities, top_classes(probabilities, top_k))]


OPTIONS = ('model', 'input_size', 'crop_pct', 'eval_fit', 'exif', 'background', 'imagenet_default_mean_and_std')


def load(path: str, device: str = 'cpu', use_ema: bool = False, class_names: str = '', **options: Any) -> Classifier:
    """Load a classifier. Raises `beit.errors.UserError`: the file can't be read, or does not describe its model.

    Args:
        path (str): a checkpoint, the folder of a training (its best checkpoint), what `run_export.py` wrote as
            safetensors or for Hugging Face, or other BEiT weights, which need `model`; a file or an https URL.
        device (str): where the network computes.
        use_ema (bool): take the averaged weights.
        class_names (str): a file with the names of classes, one a line or JSON, for weights without names.
        options: `OPTIONS`, as the flags of these names; they win over the file.
    """
    for name in set(options) - set(OPTIONS):
        raise TypeError('beit.load has no option %s; it has %s' % (name, ', '.join(OPTIONS)))
    try:
        loaded = load_for_inference(os.fspath(path), use_ema, class_names, **options)
    except UserError as error:
        raise UserError(str(error).replace('--resume ', '', 1)) from None
    return Classifier(loaded, accelerator.find_device(device, 0, 1))
