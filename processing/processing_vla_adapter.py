"""Processor of VLA-Adapter: a robot's frames, instruction and state to the inputs of the model."""

import hashlib
import json
from typing import Any

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

# Older releases of transformers copy only the files that this one imports itself, so it names them all.
from .camera_names_vla_adapter import matching_names  # noqa: F401
from .image_preparation_vla_adapter import prepare  # noqa: F401
from .image_processing_vla_adapter import VLAAdapterImageProcessor, VLAAdapterImageProcessorKwargs
from .jpeg_round_trip_vla_adapter import jpeg_round_trip  # noqa: F401


# By `prompt_style`. The instruction is in lower case, as in training.
PROMPTS = {
    "chat": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat action should the robot take to {instruction}?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "in_out": "In: What action should the robot take to {instruction}?\nOut:",
}


class VLAAdapterProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: VLAAdapterImageProcessorKwargs
    _defaults = {"text_kwargs": {"padding": True}, "common_kwargs": {"return_tensors": "pt"}}


class VLAAdapterProcessor(ProcessorMixin):
    r"""
    Camera frames, an instruction and the robot's state as inputs of [`VLAAdapterForActionPrediction.predict_action`].

    Args:
        image_processor ([`VLAAdapterImageProcessor`]): prepares the frames.
        tokenizer (`PreTrainedTokenizerBase`): a Qwen2 tokenizer.
        prompt_style (`str`, *optional*, defaults to `"chat"`): how the model was prompted in training: `"chat"` (all
            published checkpoints) or `"in_out"` (`In: ... Out:`).
        proprio_dim (`int`, *optional*, defaults to 8): size of the robot's state.

    Raises:
        ValueError: for an unknown prompt style.
    """

    valid_processor_kwargs = VLAAdapterProcessorKwargs
    skip_tensor_conversion = ["state", "preparation"]

    def __init__(
        self,
        image_processor: VLAAdapterImageProcessor | None = None,
        tokenizer: Any = None,
        prompt_style: str = "chat",
        proprio_dim: int = 8,
        **kwargs: Any,
    ):
        if prompt_style not in PROMPTS:
            raise ValueError(f"prompt_style must be one of {', '.join(PROMPTS)}, got {prompt_style!r}.")
        self.prompt_style = prompt_style
        self.proprio_dim = proprio_dim
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_model_config(
        cls, config: Any, tokenizer: Any, prompt_style: str | None = None, **image_options: Any
    ) -> "VLAAdapterProcessor":
        """The processor of a model with this [`VLAAdapterConfig`].

        Args:
            config ([`VLAAdapterConfig`]): the model's configuration.
            tokenizer (`PreTrainedTokenizerBase`): a Qwen2 tokenizer.
            prompt_style, image_options: replace what the configuration says. (The model refuses inputs that were
                prepared in another way than its configuration says.)
        """
        prompt_style = prompt_style or config.prompt_style or "chat"
        image_processor = VLAAdapterImageProcessor.from_model_config(config, **image_options)
        return cls(image_processor, tokenizer, prompt_style=prompt_style, proprio_dim=config.proprio_dim)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, source: str, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        image_kwargs = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
        try:
            # Not AutoImageProcessor, which needs torchvision in older releases of transformers.
            image_processor = VLAAdapterImageProcessor.from_pretrained(source, **image_kwargs)
        except OSError as error:
            raise OSError(
                f"{source} has no processor_config.json (nor preprocessor_config.json), or it cannot be read: {error}"
            ) from error
        try:
            tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", source, **kwargs)
        except OSError:
            raise
        except Exception as error:  # tokenizers raises plain Exceptions for damaged files
            raise ValueError(
                f"The tokenizer of {source} cannot be read: tokenizer.json is missing or damaged, or the repository "
                f"asks for code of its own, which is not run without trust_remote_code: {error}"
            ) from error
        check_tokenizer(tokenizer, source)
        return [image_processor, tokenizer]

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, state: Any = None, **kwargs: Any
    ) -> BatchFeature:
        r"""
        Prepare one observation or a batch of them.

        Args:
            images: the frames, see [`VLAAdapterImageProcessor.make_samples`]: for one observation a list with one
                frame per camera (or a dict by camera name), for a batch a list of such.
            text (`str` or `list[str]`): the instruction, or one per observation.
            state (array-like, *optional*): the robot's state in physical units, `(proprio_dim,)` or
                `(batch, proprio_dim)`.
            kwargs: as for any processor, e.g. `padding`, `padding_side`, `do_center_crop`, `return_tensors`.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` `(batch, prompt)`, `pixel_values`
            `(batch, 6 * cameras, height, width)`, `state`, a float64 NumPy array `(batch, proprio_dim)`, and
            `preparation`, a string (see [`describe_preparation`]). The state is not a tensor, so that
            `inputs.to(torch.bfloat16)` cannot round it before it is normalised.

        Raises:
            ValueError, TypeError: for a wrong number of cameras, an empty instruction or a state of the wrong size.
                The message names what was expected. A TypeError also for an unknown option.
        """
        if images is None or text is None:
            raise ValueError(
                f"{'images' if images is None else 'text'} is missing; the processor needs images and text."
            )
        _check_options(kwargs)
        merged = self._merge_kwargs(
            VLAAdapterProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        merged["images_kwargs"]["return_tensors"] = return_tensors

        prompts = self.make_prompts(text)
        samples = self.image_processor.make_samples(images)
        if len(samples) != len(prompts):
            raise ValueError(f"images has {len(samples)} observations and text {len(prompts)} instructions.")
        if state is not None:
            state = self._check_state(state, len(prompts))

        data = {
            **self.tokenizer(prompts, return_tensors=return_tensors, **merged["text_kwargs"]),
            **self.image_processor(samples, **merged["images_kwargs"]),
        }
        if state is not None:
            data["state"] = state
        data["preparation"] = self.describe_preparation(**merged["images_kwargs"])
        return BatchFeature(data=data, skip_tensor_conversion=self.skip_tensor_conversion)

    def describe_preparation(self, **image_options: Any) -> str:
        """The settings that the processor must share with the model, as JSON under the names of the model's fields.

        The model compares them with its configuration: inputs that are prepared in another way than the model was
        trained with give actions that look right and are wrong.

        Args:
            image_options: of one call, in place of the processor's own.
        """
        options = {
            name: getattr(self.image_processor, name) for name in ("do_jpeg_round_trip", "do_center_crop", "crop_area")
        }
        options |= {name: value for name, value in image_options.items() if name in options and value is not None}
        return json.dumps(
            {
                "cameras": list(self.image_processor.cameras),
                "image_jpeg_round_trip": options["do_jpeg_round_trip"],
                "image_center_crop": options["crop_area"] if options["do_center_crop"] else None,
                "prompt_style": self.prompt_style,
                "tokenizer_fingerprint": self.tokenizer_fingerprint,
            }
        )

    @property
    def tokenizer_fingerprint(self) -> str:
        """A hash of a prompt's tokens. Another model's tokenizer gives other tokens, and so wrong actions."""
        tokens = self.tokenizer(PROMPTS["in_out"].format(instruction="pick up the cup"))["input_ids"]
        return hashlib.blake2b(json.dumps(list(tokens)).encode(), digest_size=8).hexdigest()

    def make_prompts(self, text: str | list[str]) -> list[str]:
        """The prompts around the instructions.

        Raises:
            TypeError, ValueError: for an instruction that is no string, is empty or holds a control token.
        """
        instructions = [text] if isinstance(text, str) else list(text)
        for index, instruction in enumerate(instructions):
            if not isinstance(instruction, str):
                raise TypeError(f"text[{index}] must be a string, got {type(instruction).__name__}.")
            if not instruction.strip():
                raise ValueError(f"text[{index}] is empty; every observation needs an instruction.")
        instructions = [instruction.lower() for instruction in instructions]
        control_tokens = self._control_tokens()
        for index, instruction in enumerate(instructions):
            for token in control_tokens:
                if token in instruction:
                    raise ValueError(
                        f"text[{index}] holds {token!r}, which the tokenizer reads as a control token, not as words."
                    )
        return [PROMPTS[self.prompt_style].format(instruction=instruction) for instruction in instructions]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "state", "preparation"]

    def _control_tokens(self) -> list[str]:
        """Tokens such as the end of a turn. Words that were added to the vocabulary are not among them."""
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special or token.content.startswith("<")]

    def _check_state(self, state: Any, batch_size: int) -> np.ndarray:
        state = _without_tensors(state)
        try:
            array = np.asarray(state, dtype=np.float64)
        except TypeError as error:
            raise TypeError(f"state must be numbers: {error}") from error
        except ValueError as error:
            raise ValueError(
                f"state must be numbers, one row of {self.proprio_dim} per observation: {error}"
            ) from error
        if array.ndim == 1 and batch_size == 1:
            array = array[None]
        if array.shape != (batch_size, self.proprio_dim):
            raise ValueError(
                f"state must have shape ({batch_size}, {self.proprio_dim}), one row of {self.proprio_dim} values per "
                f"observation, got {array.shape}."
            )
        if not np.isfinite(array).all():
            raise ValueError(f"state holds values that are not finite: {array.tolist()}.")
        return array


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Refuse a tokenizer that loses text. transformers makes an empty one of a folder without `tokenizer.json`.

    Raises:
        ValueError: when the prompt does not survive encoding and decoding.
    """
    text = PROMPTS["in_out"].format(instruction="pick up the cup")
    if tokenizer.decode(tokenizer(text)["input_ids"]) != text:
        raise ValueError(
            f"The tokenizer of {source} cannot write the prompt: tokenizer.json is missing or damaged, or it is not a "
            "Qwen2 tokenizer."
        )


def _without_tensors(state: Any) -> Any:
    """The state with arrays instead of tensors, also in lists. Tensors of 16 bits are refused."""
    dtype = str(getattr(state, "dtype", "")).removeprefix("torch.")
    if dtype in ("float16", "bfloat16"):
        raise ValueError(f"state is {dtype}, which has already lost digits; give float32 or float64.")
    if isinstance(state, (list, tuple)):
        return [_without_tensors(part) for part in state]
    return state.detach().cpu().numpy() if hasattr(state, "detach") else state


def _check_options(options: dict[str, Any]) -> None:
    """Refuse unknown options. transformers only warns about them, and a misspelled option would have no effect."""
    parts = {
        part: set(VLAAdapterProcessorKwargs.__annotations__[part].__annotations__)
        for part in ("text_kwargs", "images_kwargs")
    }
    parts["common_kwargs"] = set.union(*parts.values())
    unknown = [name for name in options if name not in parts["common_kwargs"] | set(parts)]
    for part in set(parts) & set(options):
        unknown += [f"{part}[{name!r}]" for name in options[part] if name not in parts[part]]
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: the processor has no such option.")


__all__ = ["VLAAdapterProcessor", "check_tokenizer"]
