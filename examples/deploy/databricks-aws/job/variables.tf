variable "workspace_url" {
  description = "Address of the workspace: the output of workspace/, or of a workspace you have."
  type        = string

  validation {
    condition     = can(regex("^https://[^/]+/?$", var.workspace_url))
    error_message = "An address such as https://dbc-01234567-89ab.cloud.databricks.com."
  }
}

variable "instance_profile_arn" {
  description = "Instance profile with which the nodes reach the buckets: the output of workspace/, or one of yours."
  type        = string

  validation {
    condition     = can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:instance-profile/.+$", var.instance_profile_arn))
    error_message = "An ARN such as arn:aws:iam::012345678901:instance-profile/curator-embed-nodes."
  }
}

variable "wheel" {
  description = "The package, built with 'uv build --wheel' or 'python -m build --wheel'."
  type        = string

  validation {
    condition     = can(regex("curator_embed-[^/]+\\.whl$", var.wheel)) && fileexists(var.wheel)
    error_message = "Path of a file curator_embed-VERSION-py3-none-any.whl that is there; keep that name, as pip reads it."
  }
}

variable "extras" {
  description = "Extras of the package to install on the nodes."
  type        = list(string)
  default     = ["cuda12", "databricks", "s3"]

  validation {
    condition     = contains(var.extras, "databricks") && alltrue([for name in var.extras : can(regex("^[a-z0-9]+$", name))])
    error_message = "Names of extras, 'databricks' among them. The ML runtimes' NVIDIA drivers are for CUDA 12: 'cuda12'."
  }
}

variable "source_url" {
  description = "The images: s3://BUCKET/FOLDER with shards, a path list, parquet files with images."
  type        = string

  validation {
    condition     = startswith(var.source_url, "s3://")
    error_message = "A URL that begins with s3://, which all nodes reach."
  }
}

variable "output_url" {
  description = "Folder for the parquet files with the embeddings."
  type        = string

  validation {
    condition     = startswith(var.output_url, "s3://")
    error_message = "A URL that begins with s3://, which all nodes reach."
  }
}

variable "model" {
  description = "A timm name, or an OpenAI CLIP name."
  type        = string
  default     = "vit_large_patch14_clip_quickgelu_224.openai"
}

variable "batch_size" {
  description = "Images a batch on a GPU."
  type        = number
  default     = 512

  validation {
    condition     = var.batch_size >= 1 && floor(var.batch_size) == var.batch_size
    error_message = "A whole number, 1 or more."
  }
}

variable "decode_threads" {
  description = "Threads a worker decodes with: about the cores of a node for each of its GPUs."
  type        = number
  default     = 16

  validation {
    condition     = var.decode_threads >= 1 && floor(var.decode_threads) == var.decode_threads
    error_message = "A whole number, 1 or more."
  }
}

variable "more_arguments" {
  description = "Further arguments of 'curator-embed embed', for instance [\"--hash\", \"phash\", \"--properties\"]."
  type        = list(string)
  default     = []
}

variable "workers" {
  description = "Nodes with GPUs that embed. The driver comes on top."
  type        = number
  default     = 2

  validation {
    condition     = var.workers >= 1 && floor(var.workers) == var.workers
    error_message = "At least 1: on a single node there would be no Dask workers."
  }
}

variable "node_type_id" {
  description = "Instance type of the workers. Decoding needs cores, so rather many for each GPU."
  type        = string
  default     = "g5.4xlarge"

  validation {
    condition     = can(regex("^[gp][0-9][a-z]*\\.[0-9]*(x?large|metal).*$", var.node_type_id))
    error_message = "An instance type with NVIDIA GPUs, such as g5.4xlarge, g6.4xlarge or p4d.24xlarge."
  }
}

variable "driver_node_type_id" {
  description = "Instance type of the driver, which runs the scheduler and embeds nothing. Null for the workers'."
  type        = string
  default     = null
}

variable "spark_version" {
  description = "Databricks Runtime, an ML one for GPUs. Null for the newest with long-term support."
  type        = string
  default     = null

  validation {
    condition     = var.spark_version == null || can(regex("gpu-ml", var.spark_version))
    error_message = "A version such as 17.3.x-gpu-ml-scala2.13: other runtimes have no NVIDIA driver."
  }
}

variable "availability" {
  description = "SPOT_WITH_FALLBACK, SPOT or ON_DEMAND for the workers; the driver is on demand always."
  type        = string
  default     = "SPOT_WITH_FALLBACK"

  validation {
    condition     = contains(["SPOT_WITH_FALLBACK", "SPOT", "ON_DEMAND"], var.availability)
    error_message = "SPOT_WITH_FALLBACK, SPOT or ON_DEMAND."
  }
}

variable "threads_per_worker" {
  description = "Shards a worker works on at a time: 2 lets one be written while the next is read."
  type        = number
  default     = 2

  validation {
    condition     = var.threads_per_worker >= 1 && floor(var.threads_per_worker) == var.threads_per_worker
    error_message = "A whole number, 1 or more."
  }
}

variable "retries" {
  description = "How often a run that failed is started again. It goes on where it stopped."
  type        = number
  default     = 2

  validation {
    condition     = var.retries >= 0 && floor(var.retries) == var.retries
    error_message = "A whole number, 0 or more."
  }
}

variable "secret_variables" {
  description = "Environment variable -> SCOPE/KEY of a secret in the workspace, for instance { HF_TOKEN = \"models/hf-token\" }."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for reference in values(var.secret_variables) : can(regex("^[\\w.-]+/[\\w.-]+$", reference))])
    error_message = "Write SCOPE/KEY: the secret itself stays in its scope, out of this file and out of Terraform's state."
  }
}

variable "log_url" {
  description = "Folder in S3 for the nodes' logs, the init script's among them. Null for none."
  type        = string
  default     = null

  validation {
    condition     = var.log_url == null || startswith(coalesce(var.log_url, "-"), "s3://")
    error_message = "A URL that begins with s3://, in a bucket that the nodes may write to; or null."
  }
}

variable "log_region" {
  description = "AWS region of log_url's bucket."
  type        = string
  default     = null
}

variable "notify" {
  description = "Addresses that get a mail when the job fails."
  type        = list(string)
  default     = []
}

variable "folder" {
  description = "Folder of the workspace for the wheel, the scripts and the cluster's file."
  type        = string
  default     = "/Shared/curator-embed"

  validation {
    condition     = startswith(var.folder, "/") && !endswith(var.folder, "/")
    error_message = "An absolute path without a slash at its end."
  }
}
