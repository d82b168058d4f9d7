"""The dual DNN: a complex teacher trains a fast student in the same pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import tensorflow as tf
import tf_keras

from qianmo.layers.bi_interaction import BiInteraction
from qianmo.layers.bottom import Bottom
from qianmo.layers.cin import CIN
from qianmo.layers.cross import CrossNetwork
from qianmo.layers.embed import Embedded
from qianmo.layers.encode import example
from qianmo.layers.fm import FM
from qianmo.layers.fwfm import FwFM
from qianmo.layers.label_heads import present, weighted
from qianmo.layers.losses import Distance, distillation
from qianmo.layers.schema import Schema
from qianmo.layers.seam import check_seam
from qianmo.layers.seeding import derive_seed, pick_seed
from qianmo.layers.tower import Tower, TowerOutput
from qianmo.models.ranker import Ranker, Targets
from qianmo.models.road import Road

EmbeddingsFrom = Literal["teacher", "both"]

FIELD_INTERACTIONS = {"fm": FM, "fwfm": FwFM, "bi_interaction": BiInteraction, "cin": CIN}
FLAT_INTERACTIONS = {"cross": CrossNetwork}
TABLES, TEACHER, STUDENT = range(3)  # paths of the parts' seeds


@tf_keras.utils.register_keras_serializable(package="qianmo")
class DualDNN(Ranker):
    """Two networks on one embedding; the teacher's has an interaction layer, the student's not.

        L = l(y, z_T) + l(y, z_S) + w * D(sg(z_T), z_S)
            + hint_weight * sum_l ||sg(a_T^l) - R_l a_S^l||^2
        w = kd_weight * min(1, step / kd_warmup_steps)

    l is the loss of the labels (`label_losses`), D the `distillation` distance; both are sums over
    the labels that the row has, by the labels' weights. a^l are the towers' hidden layers, paired
    from the last one back; R_l is a learned projection where their widths differ and the identity
    where they agree. The student reads sg(embedding), so the teacher and the tables move exactly as
    they do when the teacher is trained alone.

    The related methods are the same model with other arguments:

        Rocket Launching       embeddings_from="both", distance="logit_mse", hint_weight=0
        two-stage distillation teacher_frozen=True, starting from a trained teacher's weights
        shared embeddings only kd_weight=0, hint_weight=0
        student alone          teacher_bottom=None, teacher_tower=None

    Args:
      schema: what a row holds.
      teacher_bottom, teacher_tower: the teacher, or None for a student alone.
      student_bottom, student_tower: the student.
      kd_weight, distance, temperature: see `distillation`.
      kd_warmup_steps: steps over which w grows to kd_weight, as an untrained teacher has little to
        say; 0 for none.
      hint_weight: weight of the hidden layers' distances.
      embeddings_from: whose gradient the tables take, "teacher" or "both".
      teacher_frozen: whether teacher and tables stay as they are.
      **kwargs: arguments of `Ranker`.

    Outputs: logits of the heads "teacher" and "student".

    Raises:
      ValueError: a wrong argument, or a tower that would misread its bottom's h.

    References: the dual-DNN ranking model of iQIYI; Zhou et al. 2018, Rocket Launching.
    """

    serving_head = "student"

    def __init__(
        self,
        schema: Schema | Mapping[str, Any],
        teacher_bottom: tf_keras.layers.Layer | None,
        teacher_tower: Tower | None,
        student_bottom: tf_keras.layers.Layer,
        student_tower: Tower,
        *,
        kd_weight: float = 1.0,
        kd_warmup_steps: int = 0,
        distance: Distance = "probability_mse",
        temperature: float = 1.0,
        hint_weight: float = 0.0,
        embeddings_from: EmbeddingsFrom = "teacher",
        teacher_frozen: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(schema, **kwargs)
        if distance not in get_args(Distance):
            raise ValueError(
                f"`distance` should be one of {get_args(Distance)}. Received: {distance!r}"
            )
        if embeddings_from not in get_args(EmbeddingsFrom):
            raise ValueError(
                f"`embeddings_from` should be one of {get_args(EmbeddingsFrom)}. "
                f"Received: {embeddings_from!r}"
            )
        for key, value in (
            ("kd_weight", kd_weight),
            ("kd_warmup_steps", kd_warmup_steps),
            ("hint_weight", hint_weight),
        ):
            if not value >= 0:
                raise ValueError(f"`{key}` should be >= 0. Received: {value}")
        if not temperature > 0:
            raise ValueError(f"`temperature` should be > 0. Received: {temperature}")
        if (teacher_bottom is None) != (teacher_tower is None):
            raise ValueError("Give `teacher_bottom` and `teacher_tower`, or neither.")
        if teacher_tower is not None:
            check_seam(teacher_bottom, teacher_tower)
        check_seam(student_bottom, student_tower)
        # The teacher stands where a plain road has its own, so that one trained alone can start it.
        self.bottom = teacher_bottom
        self.tower = teacher_tower
        self.student_bottom = student_bottom
        self.student_tower = student_tower
        self.kd_weight = kd_weight
        self.kd_warmup_steps = kd_warmup_steps
        self.distance = distance
        self.temperature = temperature
        self.hint_weight = hint_weight
        self.embeddings_from = embeddings_from
        self.teacher_frozen = teacher_frozen
        self.head_names = ("student",) if teacher_tower is None else ("teacher", "student")
        self.hint_projections: list[tf_keras.layers.Layer | None] = []
        if teacher_frozen:
            self.freeze_teacher()
        if teacher_tower is not None and hint_weight:
            if not all(
                isinstance(tower, Tower) and tower.mlp.units
                for tower in (teacher_tower, student_tower)
            ):
                raise ValueError(
                    "`hint_weight` needs one tower with hidden layers in teacher and student."
                )
            self.hint_projections = [
                None
                if t == s
                else tf_keras.layers.Dense(
                    t,
                    use_bias=False,
                    kernel_initializer=tf_keras.initializers.GlorotUniform(
                        derive_seed(student_tower.seed, 2, i)
                    ),
                    dtype=self.dtype_policy,
                    name=f"hint_{i}",
                )
                for i, (t, s) in enumerate(self._hint_widths())
            ]

    def freeze_teacher(self) -> None:
        """From now on steps move the student alone; teacher and tables stay as they are."""
        self.teacher_frozen = True
        for part in (self.embed, self.bottom, self.tower):
            if part is not None:
                part.trainable = False

    @property
    def teacher_bottom(self) -> tf_keras.layers.Layer | None:
        """The teacher's bottom, if there is a teacher."""
        return self.bottom

    @property
    def teacher_tower(self) -> Tower | None:
        """The teacher's tower, if there is a teacher."""
        return self.tower

    def trained_apart(self) -> Sequence[tf.Variable]:
        """The teacher's weights."""
        parts = [part for part in (self.bottom, self.tower) if part is not None]
        return [variable for part in parts for variable in part.trainable_variables]

    def _hint_widths(self) -> list[tuple[int, int]]:
        teacher = self.teacher_tower.mlp.units if self.teacher_tower else ()
        return list(zip(reversed(teacher), reversed(self.student_tower.mlp.units), strict=False))

    def build(self, input_shape: Any = None) -> None:
        """Makes all weights; those of the projections, which only training calls, too."""
        super().build(input_shape)
        if self.hint_projections:
            for project, (_, width) in zip(self.hint_projections, self._hint_widths(), strict=True):
                if project is not None and not project.built:
                    project.build((None, width))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Sets the optimisers; see `Ranker`.

        Raises:
          ValueError: the student reads table columns that nothing would teach.
        """
        super().compile(*args, **kwargs)
        if self.teacher_tower is None or (
            self.embeddings_from == "both" and not self.teacher_frozen
        ):
            return
        self.build()
        read = {head: self._read_columns(head) for head in self.head_names}
        missing = [name for name in read["student"] if name not in read["teacher"]]
        if missing:
            raise ValueError(
                f"The student reads {missing[0]}, which the teacher does not, and the tables take "
                "the teacher's gradient alone: they would stay as they start. Choose a teacher "
                "that reads them, a student that does not, or `embeddings_from` both."
            )

    def _read_columns(self, head: str) -> list[str]:
        """Names of the tables' columns that have a derivative in a head's logits of random rows."""
        places = self.schema.num_domains + 1 if self.schema.domain_feature else 1
        embedded = self.embed(self.encode(example(self.schema, 8 * places)))
        *fields, linear, dense = (
            tf.cast(tf.random.stateless_normal(tf.shape(x), [0, i]), x.dtype)
            for i, x in enumerate((*embedded.fields, embedded.linear, embedded.dense))
        )
        domain = tf.range(8 * places, dtype=tf.int64) % places
        with tf.GradientTape() as tape:
            tape.watch([*fields, linear])
            logits = self._head(head, Embedded(tuple(fields), linear, dense, domain)).logits
        *of_fields, of_linear = tape.gradient(
            logits, [*fields, linear], unconnected_gradients="zero"
        )
        names = [f.name for dim in self.embed.dims for f in self.embed.features_of(dim)]
        is_read = [one for g in of_fields for one in (g.numpy() != 0).any((0, 2))]
        found = [f"the vectors of `{name}`" for name in itertools.compress(names, is_read)]
        return found + ["first-order terms"] * bool((of_linear.numpy() != 0).any())

    @property
    def starts_trained(self) -> bool:
        """A frozen teacher must have learned before."""
        return self.teacher_frozen

    def heads(
        self, embedded: Embedded, names: Sequence[str], training: bool = False
    ) -> dict[str, TowerOutput]:
        """Computes "teacher" and "student", or one of them; the other leaves no trace."""
        found = {}
        if "teacher" in names and self.teacher_tower is not None:
            # A frozen teacher drops nothing out.
            learns = training and not self.teacher_frozen
            found["teacher"] = self._head("teacher", embedded, learns)
        if "student" in names:
            if self.teacher_tower is not None and self.embeddings_from == "teacher":
                embedded = tf.nest.map_structure(tf.stop_gradient, embedded)
            found["student"] = self._head("student", embedded, training)
        return found

    def _head(self, head: str, embedded: Embedded, training: bool = False) -> TowerOutput:
        bottom: Any = self.student_bottom if head == "student" else self.bottom
        return self.tower_of(head)(bottom(embedded, training=training), training=training)

    def tower_of(self, head: str) -> Tower:
        """The teacher's tower or the student's."""
        tower = self.tower if head == "teacher" else self.student_tower
        if tower is None:
            raise ValueError("A student alone has no teacher.")
        return tower

    def loss_terms(self, heads: Mapping[str, TowerOutput], targets: Targets) -> dict[str, Any]:
        """The parts of L; weights of 0 leave their part out."""
        student = heads["student"]
        terms = {"student_loss": self.label_loss(student.logits, targets)}
        if "teacher" not in heads:
            return terms
        teacher = heads["teacher"]
        if not self.teacher_frozen:
            terms["teacher_loss"] = self.label_loss(teacher.logits, targets)
        if self.kd_weight:
            weight = self.kd_weight
            if self.kd_warmup_steps:
                step = tf.cast(self.optimizer.iterations, tf.float32)
                weight *= tf.minimum(1.0, step / self.kd_warmup_steps)
            distances = distillation(
                teacher.logits,
                student.logits,
                self.distance,
                self.temperature,
                [self.schema.kind(label) for label in self.schema.labels],
            )
            _, of_labels = present(targets["labels"], self.label_weights(targets))
            terms["kd"] = weight * tf.reduce_sum(weighted(of_labels, distances), 1)
        if self.hint_weight:
            pairs = zip(
                reversed(teacher.hidden),
                reversed(student.hidden),
                self.hint_projections,
                strict=False,
            )
            terms["hint"] = self.hint_weight * tf.add_n(
                [
                    tf.reduce_sum(
                        tf.square(tf.stop_gradient(t) - (s if project is None else project(s))), 1
                    )
                    for t, s, project in pairs
                ]
            )
        return terms

    def get_config(self) -> dict[str, Any]:
        """The model's arguments, its layers serialised."""
        layers = ("teacher_bottom", "teacher_tower", "student_bottom", "student_tower")
        values = ("kd_weight", "kd_warmup_steps", "distance", "temperature", "hint_weight")
        return {
            **self.ranker_config(),
            **{
                k: v and tf_keras.layers.serialize(v)
                for k, v in ((k, getattr(self, k)) for k in layers)
            },
            **{k: getattr(self, k) for k in (*values, "embeddings_from", "teacher_frozen")},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> DualDNN:
        """Builds the model and its layers."""
        layers = ("teacher_bottom", "teacher_tower", "student_bottom", "student_tower")
        parts = {
            k: config[k] and tf_keras.layers.deserialize(config[k], custom_objects) for k in layers
        }
        return cls(**{**config, **parts})


def interaction_layers(
    interactions: Mapping[str, Mapping[str, Any]],
) -> tuple[list[tf_keras.layers.Layer], list[tf_keras.layers.Layer]]:
    """The interactions named, those on field vectors and those on the flat row.

    Raises:
      ValueError: an unknown name.
    """
    fields, flat = [], []
    for name, arguments in interactions.items():
        if name in FIELD_INTERACTIONS:
            fields.append(FIELD_INTERACTIONS[name](**arguments))
        elif name in FLAT_INTERACTIONS:
            flat.append(FLAT_INTERACTIONS[name](**arguments))
        else:
            known = sorted({*FIELD_INTERACTIONS, *FLAT_INTERACTIONS})
            raise ValueError(f"An interaction should be one of {known}. Received: {name!r}")
    return fields, flat


def teacher(
    schema: Schema,
    interactions: Mapping[str, Mapping[str, Any]],
    units: Sequence[int],
    dropout: float = 0.0,
    seed: int | None = None,
) -> tuple[Bottom, Tower]:
    """The teacher's bottom and tower: h = [interactions(V) ; x], z = MLP(h)."""
    fields, flat = interaction_layers(interactions)
    bottom = Bottom(fields, flat, flat=True, name="teacher_bottom")
    return bottom, Tower(len(schema.labels), units, dropout, seed=seed, name="teacher_tower")


def dual_dnn(
    schema: Schema,
    *,
    interactions: Mapping[str, Mapping[str, Any]] | None = None,
    teacher_units: Sequence[int] = (256, 128, 64),
    student_units: Sequence[int] = (64, 32),
    dropout: float = 0.0,
    **kwargs: Any,
) -> DualDNN:
    """A dual DNN by the names of its interactions.

    Args:
      schema: what a row holds.
      interactions: name -> arguments, of fm, fwfm, bi_interaction, cin, cross. None: student alone.
      teacher_units: widths of the teacher's MLP.
      student_units: widths of the student's MLP.
      dropout: of the teacher's MLP, in training.
      **kwargs: arguments of `DualDNN` and `Ranker`.
    """
    # Tables, teacher and student start the same whichever of them a model has.
    seed = pick_seed(None)
    bottom, tower = None, None
    if interactions is not None:
        bottom, tower = teacher(
            schema, interactions, teacher_units, dropout, derive_seed(seed, TEACHER)
        )
    return DualDNN(
        schema,
        bottom,
        tower,
        Bottom(flat=True, name="student_bottom"),
        Tower(
            len(schema.labels),
            student_units,
            seed=derive_seed(seed, STUDENT),
            name="student_tower",
        ),
        **{"embedding_seed": derive_seed(seed, TABLES), **kwargs},
    )


def teacher_alone(
    schema: Schema,
    *,
    interactions: Mapping[str, Mapping[str, Any]],
    teacher_units: Sequence[int] = (256, 128, 64),
    dropout: float = 0.0,
    **kwargs: Any,
) -> Road:
    """The teacher of `dual_dnn` without a student, on the plain road."""
    seed = pick_seed(None)  # as `dual_dnn` draws it
    bottom, tower = teacher(
        schema, interactions, teacher_units, dropout, derive_seed(seed, TEACHER)
    )
    return Road(schema, bottom, tower, **{"embedding_seed": derive_seed(seed, TABLES), **kwargs})
