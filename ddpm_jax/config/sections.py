"""The sections of a run's configuration: every option once, with its default, help text, range, and may-it-change.

Field names are unique over all sections. Standard library only, with `option.py`.
"""

from __future__ import annotations

import dataclasses

from ddpm_jax.config.option import option

BETA_SCHEDULES = ("linear", "quadratic", "scaled_linear", "cosine", "sigmoid")
WITHOUT_ENDS = ("cosine",)  # of them, those that have no use for beta_start and beta_end
AUTOENCODER_MEASURES = ("reconstruction", "frechet", "latents")  # of --measures, those of --stage=autoencoder
RESTARTING = ("cosine", "linear")  # learning rates that depend on --num_steps from the first step on


# A table: each option takes as few lines as it can.
# fmt: off
@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which images, in which order, and how many in a batch."""

  dataset: str = option("digits", "'digits' (embedded), any TensorFlow Datasets name such as 'cifar10' or "
                        "'lsun/bedroom', or own images: 'folder:PATH', 'zip:PATH', 'webdataset:GLOB' (tar shards) or "
                        "'parquet:PATH' (files of Hugging Face data sets). Own images take a preset that fits the "
                        "device unless --preset or --flagfile names another.")
  split: str = option("train", "Which part of the data set, in TFDS's notation ('train', 'train+test', "
                      "'train[:90%]'). Own images have 'train' and slices of it, each a random part of all of their "
                      "folders; a folder of parquet files also has the splits that its files are named after.")
  only: str = option("", "Train on the images of these classes alone, names or numbers separated by commas "
                     "('smileys-emotion,flags'); they are numbered anew from 0 in the order of the data set (empty: "
                     "all images).")
  conditioning: str = option("none", "What the network is told beside the timestep: 'none', or 'class', the class of "
                             "the image, by which images can then be drawn (--classes).", choices=("none", "class"))
  label_field: str = option("", "What holds the class of an image: a field of the .json of a webdataset, a column of a "
                            "parquet, a feature of TFDS (empty: 'label' in a .json, else the first ClassLabel).")
  image_field: str = option("", "The column, or feature, of images, where there are several (empty: the only one; in "
                            "TFDS, the first).")
  data_dir: str = option("", "Where prepared TFDS data sets live (empty: TFDS's own default, ~/tensorflow_datasets); "
                         "the digits need no folder.", may_change=True)
  manual_dir: str = option("", "A folder that already holds the data set's original files; TFDS verifies their "
                           "checksums and downloads nothing that is there.", may_change=True)
  follow_links: bool = option(False, "Follow symbolic links in a folder of images, also to files outside of it, as in "
                              "a huggingface_hub cache.", may_change=True)
  formats: str = option("all", "Which files of a folder are its images: 'all' that can be read, of which "
                        "docs/tutorials/own_images.md has the list; 'basic': .png, .jpg, .jpeg and .webp, with every "
                        "palette for colour, as in release 0.1.", choices=("all", "basic"), may_change=True)
  image_size: int | str = option(0, "Size of the images in pixels: 64 for squares, else height x width such as 48x64 "
                                 "(0: as they are, all of one size). See --resize.", minimum=0, size=True)
  resize: str = option("crop", "How images come to --image_size: 'crop' resizes them until they cover it and crops the "
                       "rest; 'squash' resizes height and width each by its own factor; 'pad' resizes until they fit "
                       "into it and adds white.", choices=("crop", "squash", "pad"))
  crop: str = option("center", "Which part --resize=crop takes: 'center', or 'random': another one each time, drawn "
                     "from (seed, step, index). Evaluations take the center.", choices=("center", "random"))
  resample: str = option("bicubic", "The filter of resizing, always antialiased: 'bicubic' as in clean-fid; 'lanczos' "
                         "as in the data sets of StyleGAN and EDM; 'box', the mean of the pixels, as in the "
                         "downsampled ImageNet.", choices=("bicubic", "lanczos", "box"))
  batch_size: int = option(64, "Images in one training step, over all devices and processes.", minimum=1)
  random_flip: bool = option(False, "Mirror each image left-right with probability 1/2.")
  cache_gib: float = option(4.0, "Data sets whose uint8 images take at most this many GiB are decoded once and kept "
                            "in memory; larger ones are read from disk.", minimum=0, may_change=True)
  data_threads: int = option(2, "Threads that read and decode batches ahead of the step.", minimum=1, may_change=True)
  data_workers: int = option(0, "Processes that read and decode batches ahead of the step, with --data_threads "
                             "threads each; for data sets that are read from disk, as those in memory need none (0: "
                             "threads of the training process).", minimum=0, may_change=True)
  on_bad_record: str = option("fail", "An image that cannot be read: 'fail' ends the run, 'skip' takes the next image "
                              "of the data set in its place and counts it.", choices=("fail", "skip"), may_change=True)
  allow_data_change: bool = option(False, "Go on with images that differ from those that the run was trained on so "
                                   "far.", may_change=True)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  """The forward process, what the network predicts, and what it is penalised for."""

  num_timesteps: int = option(1000, "T, the number of diffusion steps.", minimum=1)
  beta_schedule: str = option("linear", "Noise schedule. 'quadratic' and 'scaled_linear' are the names that Ho et al. "
                              "and Latent Diffusion gave to the same formula, linear in sqrt(beta); 'sigmoid' is "
                              "that of diffusers.",
                              choices=BETA_SCHEDULES)
  beta_start: float = option(1e-4, "beta_1.", above=0, below=1)
  beta_end: float = option(0.02, "beta_T.", above=0, below=1)
  prediction: str = option("eps", "What the network predicts: the noise, the image, or the velocity v = "
                           "sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.", choices=("eps", "x0", "v"))
  loss: str = option("l2", "Distance between the prediction and its target.", choices=("l2", "l1", "huber"))
  loss_weighting: str = option("constant", "Weight of timestep t: 'constant' is the paper's L_simple for eps; "
                               "'min_snr' (Hang et al. 2023, gamma 5) and 'truncated_snr' (Salimans and Ho 2022) "
                               "weigh the error of x0 by min(SNR, 5) and max(SNR, 1), whatever the prediction.",
                               choices=("constant", "min_snr", "truncated_snr"))
  first_stage: str = option("", "The first stage of a latent model, which turns images into the latents that are "
                            "diffused: the workdir of a run of --stage=autoencoder, a folder of diffusers with an "
                            "AutoencoderKL or a VQModel, or a safetensors file of --mode=export (empty: the pixels "
                            "themselves are diffused). The workdir keeps a copy.")
  variance: str = option("fixed_large", "Variance of the ancestral sampler's steps: beta_t (fixed_large, CIFAR-10 in "
                         "the released code) or the posterior variance (fixed_small, its 256x256 models).",
                         choices=("fixed_small", "fixed_large"), may_change=True)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network."""

  stage: str = option("denoiser", "What is trained: 'denoiser', the U-Net that images are drawn with; 'classifier', "
                      "its encoder half with attention pooling, which tells the class of a noisy image and guides "
                      "the draws of another run as --classifier (Dhariwal and Nichol 2021); 'autoencoder', the first "
                      "stage of latent diffusion (Rombach et al. 2022), the --first_stage of another run.",
                      choices=("denoiser", "classifier", "autoencoder"))
  channels: int = option(32, "Channels at the full resolution.", minimum=2)
  channel_multipliers: tuple[int, ...] = option((1, 2), "Channels of each level as multiples of --channels; each "
                                                "level after the first halves the resolution.", minimum=1)
  num_res_blocks: int = option(1, "Residual blocks of each level on the way down; one more on the way up.", minimum=1)
  attention_resolutions: tuple[int, ...] = option((0,), "Heights, in pixels, of the levels whose residual blocks are "
                                                  "followed by self-attention (0: the lowest level if it has at most "
                                                  "16 x 16 pixels; empty: only the middle).", minimum=0)
  block: str = option("ddpm", "The residual blocks, and what comes with them: 'ddpm' of Ho et al.; 'ldm', OpenAI's, to "
                      "which the timestep embedding is added as well, of latent diffusion; 'iddpm', in which it scales "
                      "and shifts the norm; 'adm', which halve and double the resolution, too. See "
                      "docs/concepts/network.md.", choices=("ddpm", "ldm", "iddpm", "adm"))
  num_heads: int = option(1, "Heads of self-attention.", minimum=1)
  head_channels: int = option(0, "Channels of a head of self-attention, in the place of --num_heads; 64 for Dhariwal "
                              "and Nichol (0: as --num_heads says).", minimum=0)
  norm_groups: int = option(0, "Groups of GroupNorm (0: the paper's 32, fewer where a group would have less than four "
                            "channels).", minimum=0)
  dropout: float = option(0.0, "Dropout rate inside the residual blocks.", minimum=0, below=1)
  num_classes: int = option(0, "Classes that a network of --conditioning=class, or a classifier, knows (0: those of "
                            "the data set).", minimum=0)
  label_dropout: float = option(0.0, "Rate at which --conditioning=class drops the class of an image in training, so "
                                "that the network learns what images of any class are like, which --guidance_scale "
                                "needs; 0.1 is usual.", minimum=0, below=1)
  dtype: str = option("float32", "Type of the activations; parameters, loss, optimiser and likelihoods are float32 "
                      "always.", choices=("float32", "bfloat16"), may_change_once_trained=True)
  matmul_precision: str = option("default", "Precision of float32 matrix products and convolutions: 'default' is the "
                                 "fastest, with fewer bits on GPUs and TPUs; 'high' has about 11 (GPU) to 16 (TPU) "
                                 "bits; 'highest' float32's. Likelihoods and features always use 'highest'.",
                                 choices=("default", "high", "highest"), may_change_once_trained=True)
  remat: str = option("none", "What the backward pass computes again, to save memory: 'norms' what lies between the "
                      "convolutions of a residual block, 'blocks' the block with its attention, a quarter more "
                      "arithmetic.", choices=("none", "norms", "blocks"), may_change=True)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """The first stage that --stage=autoencoder trains, and its loss (Rombach et al. 2022)."""

  regularizer: str = option("kl", "What keeps the latents in bounds: 'kl', a slight pull of their distribution towards "
                            "the standard normal one; 'vq', the nearest of the vectors of a codebook.",
                            choices=("kl", "vq"))
  latent_channels: int = option(4, "Channels of the latents.", minimum=1)
  codebook_size: int = option(1024, "Vectors in the codebook of --regularizer=vq.", minimum=2)
  kl_weight: float = option(1e-6, "Weight of the KL divergence of --regularizer=kl, summed over the latents of an "
                            "image, beside the reconstruction error, summed over its pixels and channels.", minimum=0)
  perceptual: str = option("none", "What is compared beside the pixels: 'lpips', the distance of Zhang et al. 2018, "
                           "with --lpips_weights; 'features', the same distance in the layers of the classifier, or "
                           "network, that --mode=evaluate would train on this data set; 'none'.",
                           choices=("none", "features", "lpips"))
  perceptual_weight: float = option(1.0, "Weight of --perceptual.", above=0)
  lpips_weights: str = option("", "The safetensors file of --perceptual=lpips, and of the LPIPS that evaluations "
                              "measure, see experiments/convert_lpips.py.",
                              may_change=True)
  discriminator_weight: float = option(0.0, "Weight of the adversarial loss of a patch discriminator (Isola et al. "
                                       "2017), relative to the gradient of the reconstruction in the last layer (Esser "
                                       "et al. 2021); 0.5 is usual (0: no discriminator).", minimum=0)
  discriminator_start: int = option(0, "Training steps before the discriminator takes part in the loss.", minimum=0)
  discriminator_warmup: int = option(0, "Training steps before --discriminator_start in which the discriminator alone "
                                     "learns already.", minimum=0)
  discriminator_layers: int = option(3, "Strided convolutions of the discriminator: its patches are 70 pixels wide "
                                     "with 3, 34 with 2, 16 with 1.", minimum=1, maximum=6)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam (epsilon 1e-8, and beta1 0.9, beta2 0.999 by default, as in the paper) and the moving average."""

  learning_rate: float = option(2e-3, "Learning rate after the warm-up.", above=0)
  lr_schedule: str = option("constant_then_decay", "After the warm-up: 'constant' as in the paper; "
                            "'constant_then_decay', constant up to the last --decay_fraction of the steps, then down "
                            "to zero; 'cosine', a cosine down to zero at --num_steps; 'linear', a straight line to "
                            "there, as of the classifiers of Dhariwal and Nichol 2021. A run that is made longer goes "
                            "on from where the decay began; with cosine and linear the rate restarts for the added "
                            "steps.", choices=("constant", "constant_then_decay", "cosine", "linear"))
  decay_fraction: float = option(0.4, "The fraction of --num_steps, at the end, over which the learning rate of "
                                 "constant_then_decay falls to zero, as 1 - sqrt (Hägele et al. 2024).", above=0,
                                 maximum=1)
  warmup_steps: int = option(100, "Steps over which the learning rate rises linearly from zero; in a shorter run the "
                             "decay begins at the rate that was reached, and the warm-up of cosine and linear takes "
                             "half of the run.",
                             minimum=0)
  adam_b1: float = option(0.9, "beta1 of Adam: the decay of the mean gradient.", minimum=0, below=1)
  adam_b2: float = option(0.999, "beta2 of Adam: the decay of the mean square of the gradient.", minimum=0, below=1)
  weight_decay: float = option(0.0, "Decoupled weight decay, AdamW (Loshchilov and Hutter 2019): each training step "
                               "also takes this times the learning rate of every parameter away.", minimum=0)
  grad_clip: float = option(1.0, "Largest global norm of the mean gradient (0: no clipping).", minimum=0)
  ema_decay: float = option(0.995, "Decay of the exponential moving average of the weights; reached gradually as "
                            "min(decay, (1 + n) / (10 + n)) after n training steps.", minimum=0, below=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long, on what, and what is written how often."""

  seed: int = option(0, "Seed of everything random in training: initial weights, data order, timesteps, noise, flips, "
                     "dropout.", minimum=0, below=2**32)
  num_steps: int = option(2000, "Training steps in all.", minimum=1, may_change=True)
  parallel: str = option("pmap", "How a step runs on several devices: 'pmap' replicates the state, 'fsdp' shards "
                         "parameters, optimiser state and EMA.", choices=("pmap", "fsdp"), may_change=True)
  grad_accum_steps: int = option(1, "Split each batch into this many parts, one after the other: less memory, the "
                                 "same training step.", minimum=1, may_change=True)
  log_every: int = option(25, "Training steps between two lines of metrics.", minimum=1, may_change=True)
  checkpoint_every: int = option(1000, "Training steps between two checkpoints.", minimum=1, may_change=True)
  sample_every: int = option(1000, "Training steps between two sample grids, beside those after 1, 2, 4, 8, ... "
                             "minutes of training (0: none at all).", minimum=0, may_change=True)
  evaluate_every: int = option(0, "Training steps between two evaluations of what --measures names, as by "
                               "--mode=evaluate; each makes a checkpoint too (0: none).", minimum=0, may_change=True)
  best_measure: str = option("frechet", "The measure by which the best evaluated checkpoint is kept in best/; the "
                             "lowest value counts. 'bound' is that of the last of --likelihood_splits.",
                             choices=("frechet", "kid", "bound", "ode"), may_change=True)
  keep_checkpoints: int = option(3, "Newest checkpoints that are kept.", minimum=1, may_change=True)
  keep_every: int = option(0, "Checkpoints at multiples of this number of training steps are made too, and kept for "
                           "good, beside --keep_checkpoints; a guide for --guide_with is one (0: none).", minimum=0,
                           may_change=True)
  max_unsaved_steps: int = option(0, "After a checkpoint that could not be written, training steps that may be at "
                                  "risk before the run ends with an error, up to the end of a call of "
                                  "--steps_per_dispatch (0: twice --checkpoint_every).", minimum=0, may_change=True)
  on_corrupt: str = option("fallback", "A checkpoint that is damaged: 'fallback' goes back to the newest intact one, "
                           "'fail' ends the run.", choices=("fallback", "fail"), may_change=True)
  on_nonfinite: str = option("halt", "A training step whose loss or gradient is infinite or not a number: 'halt' ends "
                             "the run, 'skip' leaves the weights as they are and goes on.", choices=("halt", "skip"),
                             may_change=True)
  max_nonfinite: int = option(10, "Non-finite training steps in a row at which the run ends, with --on_nonfinite=skip.",
                              minimum=1, may_change=True)
  step_timeout: int = option(1800, "Seconds that a call of --steps_per_dispatch training steps, a checkpoint or a "
                             "sample grid may take before the process counts as stuck: every thread's stack is "
                             "printed and the process ends (0: never).", minimum=0, may_change=True)
  heartbeat_timeout: int = option(100, "Seconds after which a process of a job that is silent counts as lost.",
                                  minimum=5, may_change=True)
  preview_images: int = option(16, "Images in a sample grid during training, drawn with the EMA weights and with the "
                               "raw ones.", minimum=1, may_change=True)
  preview_steps: int = option(20, "DPM-Solver++ steps for the sample grids during training.", minimum=1,
                              may_change=True)
  distributed: str = option("auto", "'auto' joins the other processes of a Cloud TPU, Slurm, Open MPI or Kubernetes "
                            "job, or those that JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID "
                            "describe; 'off' trains alone.", choices=("auto", "off"), may_change=True)
  steps_per_dispatch: int = option(5, "The most training steps that the device makes without hearing from the host in "
                                   "between: faster where a small network's training steps take not much longer than "
                                   "starting them.", minimum=1, may_change=True)
  compilation_cache: str = option("auto", "Folder that keeps compiled programs for the next start: 'auto' is "
                                  "JAX_COMPILATION_CACHE_DIR, or else ddpm_jax/ in ~/.cache; 'off' keeps none.",
                                  may_change=True)
  writers: str = option("tensorboard", "Where the metrics go beside metrics.jsonl, separated by commas (empty: "
                        "nowhere): 'tensorboard', files in the workdir; 'wandb', Weights & Biases; a class of your "
                        "own, package.module:Class, see docs/guides/compare.md.", may_change=True)
  stop_exit_code: int = option(0, "Exit code of training that was asked to stop, with all it made saved, before it "
                               "was finished: one that is not 0 lets a scheduler start it again (4 to 125, such as "
                               "75).", minimum=0, maximum=125, may_change=True)
  profile_steps: str = option("", "A:B writes a trace of training steps A to B by jax.profiler into profile/ in the "
                              "workdir, of process 0. The calls of --steps_per_dispatch that make them are traced "
                              "whole, as they end where they would without a trace.", may_change=True)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """What --mode=sample draws, and how --mode=evaluate draws what it measures."""

  sample_task: str = option("images", "'images' from noise; 'progressive': x0_hat along the way; 'interpolate' "
                            "between pairs of images (Ho et al. 2020, section 4.4); 'slerp' between pairs of noises; "
                            "'inpaint' what a mask covers (RePaint); 'reconstruct': images encoded to noise and "
                            "decoded.",
                            choices=("images", "progressive", "interpolate", "slerp", "inpaint", "reconstruct"),
                            may_change=True)
  num_samples: int = option(64, "Images to draw; for the other tasks rows, pairs or images.", minimum=1,
                            may_change=True)
  checkpoint: str = option("newest", "Which weights: 'newest', 'best' (see --best_measure) or a number of training "
                           "steps.",
                           may_change=True)
  sampler: str = option("ddpm", "'ddpm': ancestral, Algorithm 2 of Ho et al.; 'ddim': Song et al. 2021; 'dpmpp': "
                        "DPM-Solver++(2M), Lu et al. 2022; 'heun': second order on the probability-flow ODE, Karras "
                        "et al. 2022.", choices=("ddpm", "ddim", "dpmpp", "heun"), may_change=True)
  sampling_steps: int = option(0, "Network evaluations for each image (0: all T; heun: one less, if the number is "
                               "even).", minimum=0, may_change=True)
  time_grid: str = option("auto", "Where the evaluations are: 'trailing' T, T - T/n, ...; 'uniform' from T to 1; "
                          "'quadratic' denser near 1; 'logsnr' even in the logarithm of the signal-to-noise ratio; "
                          "'logistic' densest where signal and noise are about equal; 'auto': trailing for ddpm, else "
                          "logistic.", choices=("auto", "trailing", "uniform", "quadratic", "logsnr", "logistic"),
                          may_change=True)
  eta: float = option(0.0, "Noise of ddim and dpmpp: 0 deterministic; 1 the ancestral posterior for ddim, "
                      "SDE-DPM-Solver++ for dpmpp.", minimum=0, maximum=1, may_change=True)
  threshold: str = option("auto", "What keeps x0_hat in range: 'static' clips to [-1, 1]; 'dynamic' (Saharia et al. "
                          "2022) clips at a quantile of its absolute values and rescales; 'none'; 'auto': static for "
                          "pixels, none for latents, which have no range.",
                          choices=("auto", "static", "dynamic", "none"), may_change=True)
  threshold_quantile: float = option(0.995, "The quantile of --threshold=dynamic.", above=0, maximum=1, may_change=True)
  classes: tuple[str, ...] = option((), "Classes of the images that a model of --conditioning=class draws, in turn: "
                                    "names or numbers (empty: all of them; where images are given, their own).",
                                    item=str, may_change=True)
  guidance_scale: tuple[float, ...] = option((1.0,), "g of D = D_guide + g (D_cond - D_guide): how far images are "
                                             "pushed towards their class, with a model of --label_dropout, or away "
                                             "from what --guide_with draws; 1 is off, and 2 has w = 1 in Ho and "
                                             "Salimans 2022. --mode=evaluate takes several, and compares them.",
                                             item=float, minimum=0, may_change=True)
  guidance_interval: tuple[float, ...] = option((), "LO,HI: guide only where the noise level sigma = "
                                                "sqrt((1 - alpha_bar) / alpha_bar) is above LO and at most HI "
                                                "(Kynkäänniemi et al. 2024); elsewhere the second pass is left out "
                                                "(empty: everywhere).", item=float, minimum=0, may_change=True)
  guide_with: str = option("", "What images are pushed away from by --guidance_scale: a worse version of the model "
                           "(autoguidance, Karras et al. 2024), as the number of a checkpoint of this run, 'raw' for "
                           "its raw weights, or the path of another model (empty: the same model without the class).",
                           may_change=True)
  classifier: str = option("", "The workdir of a classifier of noisy images (--stage=classifier) whose gradient guides "
                           "the draw towards --classes, of an unconditional model too.", may_change=True)
  classifier_scale: float = option(1.0, "s of s grad log p(class | x_t), by which --classifier guides.", minimum=0,
                                   may_change=True)
  sample_batch_size: int = option(0, "Images drawn at once, over all devices; does not change the images (0: what "
                                  "fits, at most 64 on each device of a CPU).", minimum=0, may_change=True)
  sample_seed: int = option(0, "Seed of the draw; image i depends on it and on i alone.", minimum=0, below=2**32,
                            may_change=True)
  sample_weights: str = option("ema", "Draw with the moving average of the weights or with the raw ones.",
                               choices=("ema", "raw"), may_change=True)
  sample_png_dir: str = option("", "Also write each image as PATH/NNNNNN.png.", may_change=True)
  input_images: str = option("", "Images for interpolate, inpaint and reconstruct: a file or a folder (empty: the "
                             "first of the data set).", may_change=True)
  mask: str = option("", "For inpaint: an image of the size of the others, white where pixels are to be drawn (empty: "
                     "the middle).", may_change=True)
  interpolation_timestep: int = option(0, "For interpolate: the timestep to which the images are diffused (0: T/2).",
                                       minimum=0, may_change=True)
  repaint_jump: int = option(10, "For inpaint: sampling steps that are undone at a time (RePaint's j).", minimum=1,
                             may_change=True)
  repaint_resamples: int = option(10, "For inpaint: how often each stretch is drawn (RePaint's r; 1: no undoing).",
                                  minimum=1, may_change=True)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """What --mode=evaluate measures."""

  measures: tuple[str, ...] = option(("frechet", "kid", "score", "precision_recall", "density_coverage", "neighbours",
                                      "bound"),
                                     "What to measure. Of samples: 'frechet' (with --features=inception the FID), "
                                     "'kid', 'score' (the Inception Score), 'precision_recall', 'density_coverage', "
                                     "'neighbours'; 'classes', the distance of each class, and which share of the "
                                     "samples the classifier of --features sees as the class that was asked for: of "
                                     "models of --conditioning=class and draws by --classifier, with the default "
                                     "measures too. Of the model: "
                                     "'bound', the variational bound, and 'ode', the likelihood of the "
                                     "probability-flow ODE, in bits/dim. Of an autoencoder, all three of them by "
                                     "default: 'reconstruction', how alike images and their reconstructions are (PSNR, "
                                     "SSIM, and LPIPS with --lpips_weights); 'frechet', the distance between the two "
                                     "(with --features=inception the rFID); 'latents', mean, deviation and KL of each "
                                     "channel, or the use of the codebook.",
                                     choices=("frechet", "kid", "score", "precision_recall", "density_coverage",
                                              "neighbours", "classes", "bound", "ode", "reconstruction", "latents"),
                                     may_change=True)
  features: str = option("auto", "What images are compared by: 'inception', with --inception_weights; 'classifier', a "
                         "small one that is trained on the data set's own labels first; 'network', one that is "
                         "trained without labels; 'auto': classifier where there are labels, else network.",
                         choices=("auto", "classifier", "network", "inception"), may_change=True)
  inception_weights: str = option("", "The safetensors file of the FID's InceptionV3, see "
                                  "experiments/convert_inception.py.", may_change=True)
  inception_resize: str = option("fid", "To 299x299 pixels: 'fid' bilinear without antialiasing, as in the reference "
                                 "code; 'clean' antialiased bicubic (Parmar et al. 2022).", choices=("fid", "clean"),
                                 may_change=True)
  evaluate_samples: int = option(0, "Samples to measure (0: as many as for the last evaluation; for the first one as "
                                 "many, from 1,000 to 50,000, as are drawn in about seven minutes, in less while "
                                 "training, on a CPU by dpmpp with 20 network evaluations unless a sampler is named). "
                                 "A number is drawn by --sampler in --sampling_steps.", minimum=0, may_change=True)
  evaluate_labels: str = option("proportional", "Classes of the samples that are measured, unless --classes names "
                                "them: 'proportional', as often as in the training set; 'uniform', all in turn.",
                                choices=("proportional", "uniform"), may_change=True)
  reference_split: str = option("", "Split that samples are compared with (empty: that of the training).",
                                may_change=True)
  reference_stats: str = option("", "An npz file of statistics that samples are compared with in place of images: of "
                                "--write_reference, pytorch-fid or clean-fid (empty: the images themselves).",
                                may_change=True)
  write_reference: str = option("", "Measure nothing; write the statistics of the data set, or of --reference_split, "
                                "into this npz file. Needs no checkpoint, and no --workdir.", may_change=True)
  likelihood_splits: str = option("", "Splits of bound and ode, and of an autoencoder's measures, separated by commas "
                                  "(empty: that of the training, and 'test' if there is one).", may_change=True)
  likelihood_examples: int = option(0, "Images of each split for bound and ode, and for an autoencoder's measures, "
                                    "evenly spaced (0: all; but with --evaluate_samples=0, unless the command itself "
                                    "says 0 here, as many as for the last evaluation; for the first one as many, from "
                                    "100 to 10,000, as take about three minutes, of an autoencoder from 1,000 to "
                                    "50,000 in about ten, or all).", minimum=0, may_change=True)
  bound_timesteps: int = option(100, "Timesteps at which the bound of each image is evaluated, drawn from as many "
                                "strata: an unbiased estimate (0: all T).", minimum=0, may_change=True)
  ode_steps: int = option(100, "Steps of Heun's method for ode, two network evaluations each, and 8 more near t = 0.",
                          minimum=1, may_change=True)
  ode_probes: int = option(1, "Random vectors of Hutchinson's estimator for ode.", minimum=1, may_change=True)
  evaluate_batch_size: int = option(100, "Images whose features or likelihoods are computed at once, over all devices.",
                                    minimum=1, may_change=True)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """What --mode=plan plans for."""

  topology: str = option("cpu", "The devices: KIND:AxB or KIND:AxBxC chips of a TPU, such as 'v5e:4x4' or "
                         "'v5p:2x2x2', or a slice as Cloud TPU calls it, such as 'v5e-16' or 'v5p-128', which need "
                         "not be here; or 'cpu', the CPU of this machine. GPUs cannot be planned.", may_change=True)


@dataclasses.dataclass(frozen=True)
class ExchangeConfig:
  """Weights in and out."""

  export_format: str = option("diffusers", "What --mode=export writes: 'diffusers', a folder that its DDPMPipeline "
                              "loads as it is; 'safetensors', one file of the parameters with the settings; 'jax', "
                              "the sampler itself, as a program that needs JAX and nothing of this package.",
                              choices=("diffusers", "safetensors", "jax"), may_change=True)
  export_dir: str = option("", "Folder that --mode=export makes; it must not exist, or be empty.", may_change=True)
  export_platforms: tuple[str, ...] = option(("cpu", "cuda", "tpu"), "Devices for which --export_format=jax makes the "
                                             "sampler; none of them need be here.",
                                             choices=("cpu", "cuda", "rocm", "tpu"), may_change=True)
  export_batch_sizes: tuple[int, ...] = option((), "Numbers of images that the sampler of --export_format=jax draws "
                                               "at once, each by a program of its own (empty: one program for any "
                                               "number).", minimum=1, may_change=True)
  init_from: str = option("", "Where the first weights come from (empty: random): a folder of diffusers, a "
                          "safetensors file of --mode=export, or another workdir, whose --checkpoint and "
                          "--sample_weights are taken. Its architecture and diffusion take the place of the defaults; "
                          "flags win over them.")
# fmt: on
