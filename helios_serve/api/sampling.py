"""From a validated body to complete `types.SamplingParams`: steps, guidance and flags, with the checkpoint's defaults.

Knows what each variant honours; what it accepts without effect becomes a `ParameterWarning`. Knows no media and no
prompts.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from helios_serve.api.names import NamedBody, shown
from helios_serve.errors import InvalidRequestError
from helios_serve.types import ModelInfo, SamplingParams, ServiceClass

MAX_STEPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterWarning:
    """A parameter that was accepted and has no effect, or one that deserves a second look."""

    param: str
    message: str


Warnings = list[ParameterWarning]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size and length of the video, and how soon it is wanted."""

    width: int
    height: int
    num_frames: int
    service_class: ServiceClass


def resolve_sampling(named: NamedBody, model: ModelInfo, shape: Shape, warnings: Warnings) -> SamplingParams:
    """All numbers of the request; appends to `warnings`.

    Raises:
        InvalidRequestError: steps, noise range or stage description that the checkpoint does not have.
    """
    body, helios = named.fields, named.fields.helios
    _check_stage_description(named, model)
    _check_sigmas(named)
    guidance_scale = _guidance_scale(named, model, warnings)
    use_zero_init = _use_zero_init(named, model, guidance_scale, warnings)
    return SamplingParams(
        width=shape.width,
        height=shape.height,
        num_frames=shape.num_frames,
        fps=float(body.fps),
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
        steps=_steps(named, model, shape.service_class, warnings),
        guidance_scale=guidance_scale,
        amplify_first_chunk=_amplify_first_chunk(named, model, warnings),
        skip_first_chunk=helios.skip_first_chunk,
        use_zero_init=use_zero_init,
        zero_steps=1 if helios.zero_steps is None else helios.zero_steps,
        image_noise_sigma_min=helios.image_noise_sigma_min,
        image_noise_sigma_max=helios.image_noise_sigma_max,
        video_noise_sigma_min=helios.video_noise_sigma_min,
        video_noise_sigma_max=helios.video_noise_sigma_max,
        frame_policy=helios.frame_policy,
        image_fit=helios.image_fit,
        crf=helios.crf,
        codec=body.codec,
        approximations=model.approximations,
    )


def _steps(named: NamedBody, model: ModelInfo, service_class: ServiceClass, warnings: Warnings) -> tuple[int, ...]:
    helios = named.fields.helios
    explicit = _explicit_steps(named, model)
    realtime = helios.profile == "realtime" or (
        helios.profile is None and service_class == "realtime" and model.variant == "distilled"
    )
    if helios.profile is not None and explicit is not None:
        warnings.append(_no_effect(named, "profile", "the explicit steps win"))
    elif helios.profile == "realtime" and model.variant != "distilled":
        warnings.append(_no_effect(named, "profile", f"{model.name} is not distilled and has one profile, quality"))
        realtime = False
    if explicit is not None:
        return explicit
    return (1,) * model.num_stages if realtime else model.default_steps


def _explicit_steps(named: NamedBody, model: ModelInfo) -> tuple[int, ...] | None:
    helios = named.fields.helios
    steps, single = helios.steps, helios.num_inference_steps
    if single is not None:
        name = named.name("helios", "num_inference_steps")
        if model.num_stages != 1:
            raise InvalidRequestError(
                f"{name} {shown(single)}: {model.name} has {model.num_stages} stages; "
                f"give helios.steps, one number per stage, like {list(model.default_steps)}",
                param=name,
            )
        if steps is not None and steps != [single]:
            raise InvalidRequestError(
                f"{name} {shown(single)}: {named.name('helios', 'steps')} says {shown(steps)}; give one of them",
                param=name,
                code="conflicting_parameters",
            )
        if not 1 <= single <= MAX_STEPS:
            raise InvalidRequestError(f"{name} {shown(single)}: must be 1 to {MAX_STEPS}", param=name)
        return (single,)
    if steps is None:
        return None
    if len(steps) != model.num_stages or not all(1 <= count <= MAX_STEPS for count in steps):
        name = named.name("helios", "steps")
        numbers = "1 number" if model.num_stages == 1 else f"{model.num_stages} numbers, one per stage"
        each = "" if model.num_stages == 1 else " each"
        raise InvalidRequestError(
            f"{name} {shown(steps)}: {model.name} needs {numbers},{each} 1 to {MAX_STEPS}", param=name
        )
    return tuple(steps)


def _guidance_scale(named: NamedBody, model: ModelInfo, warnings: Warnings) -> float:
    given = named.fields.helios.guidance_scale
    scale = model.default_guidance_scale if given is None else float(given)
    if given is not None and scale > 1 and model.variant == "distilled":
        message = f"{model.name} is distilled: guidance costs twice, not what the checkpoint was trained for"
        warnings.append(ParameterWarning(param=named.name("helios", "guidance_scale"), message=message))
    if named.fields.negative_prompt and scale <= 1:
        message = f"no effect: guidance_scale is {scale:g}, and only a value above 1 uses a negative prompt"
        warnings.append(ParameterWarning(param=named.name("negative_prompt"), message=message))
    return scale


def _use_zero_init(named: NamedBody, model: ModelInfo, guidance_scale: float, warnings: Warnings) -> bool:
    helios = named.fields.helios
    if model.guidance != "cfg_zero_star":
        obstacle = f"{model.name} does not use CFG-Zero*"
    elif guidance_scale <= 1:
        obstacle = f"guidance_scale is {guidance_scale:g}; zero-init needs guidance above 1"
    elif helios.use_zero_init is False:
        obstacle = "use_zero_init is false"
    else:
        return True
    if helios.use_zero_init is True:
        warnings.append(_no_effect(named, "use_zero_init", obstacle))
    if helios.zero_steps is not None:
        warnings.append(_no_effect(named, "zero_steps", obstacle))
    return False


def _amplify_first_chunk(named: NamedBody, model: ModelInfo, warnings: Warnings) -> bool:
    given = named.fields.helios.amplify_first_chunk
    if model.variant == "distilled":
        return True if given is None else given
    if given is True:
        warnings.append(_no_effect(named, "amplify_first_chunk", f"{model.name} is not distilled"))
    return False


def _check_sigmas(named: NamedBody) -> None:
    helios = named.fields.helios
    ranges = (
        ("image", helios.image_noise_sigma_min, helios.image_noise_sigma_max),
        ("video", helios.video_noise_sigma_min, helios.video_noise_sigma_max),
    )
    for kind, low, high in ranges:
        if low > high:
            edge = "min" if named.has("helios", f"{kind}_noise_sigma_min") else "max"
            name = named.name("helios", f"{kind}_noise_sigma_{edge}")
            problem = f"the maximum is {high:g}" if edge == "min" else f"the minimum is {low:g}"
            raise InvalidRequestError(
                f"{name} {low if edge == 'min' else high:g}: {problem}; min must not be above max", param=name
            )


def _check_stage_description(named: NamedBody, model: ModelInfo) -> None:
    """Presets of other servers describe the checkpoint; a description of another one is refused."""
    helios = named.fields.helios
    described = (
        ("is_enable_stage2", helios.is_enable_stage2, model.num_stages > 1),
        ("pyramid_num_stages", helios.pyramid_num_stages, model.num_stages),
    )
    for key, given, right in described:
        if given is not None and given != right:
            name = named.name("helios", key)
            raise InvalidRequestError(
                f"{name} {shown(given)}: {model.name} has {model.num_stages} pyramid stage"
                f"{'s' if model.num_stages > 1 else ''}; leave it out or give {shown(right)}",
                param=name,
            )


def _no_effect(named: NamedBody, key: str, reason: str) -> ParameterWarning:
    return ParameterWarning(param=named.name("helios", key), message=f"no effect: {reason}")
