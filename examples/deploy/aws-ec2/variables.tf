variable "region" {
  description = "AWS region: the one where the buckets are."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "Name a region as AWS does, for instance eu-west-1."
  }
}

variable "vpc_id" {
  description = "Network of the instance."
  type        = string

  validation {
    condition     = startswith(var.vpc_id, "vpc-")
    error_message = "An id that begins with vpc-."
  }
}

variable "subnet_id" {
  description = "Subnet with a way out (for packages and weights) and, better, a gateway endpoint for S3."
  type        = string

  validation {
    condition     = startswith(var.subnet_id, "subnet-")
    error_message = "An id that begins with subnet-."
  }
}

variable "instance_type" {
  description = "Instance with NVIDIA GPUs; every GPU gets a worker."
  type        = string
  default     = "g6.4xlarge"

  validation {
    condition     = can(regex("^[gp][0-9][a-z]*\\.[0-9]*(x?large|metal).*$", var.instance_type))
    error_message = "An instance type with NVIDIA GPUs, such as g6.4xlarge, g5.48xlarge or p5.48xlarge."
  }
}

variable "spot" {
  description = "Whether to take a spot instance. One that AWS takes back loses the shards in work: apply again to go on."
  type        = bool
  default     = false
}

variable "wheel" {
  description = "The package, built with 'uv build --wheel' or 'python -m build --wheel'."
  type        = string

  validation {
    condition     = can(regex("curator_embed-[^/]+\\.whl$", var.wheel)) && fileexists(var.wheel)
    error_message = "Path of a file curator_embed-VERSION-py3-none-any.whl that is there; keep that name, as pip reads it."
  }
}

variable "source_url" {
  description = "The images: s3://BUCKET/FOLDER with shards, a path list, parquet files with images."
  type        = string

  validation {
    condition     = startswith(var.source_url, "s3://")
    error_message = "A URL that begins with s3://."
  }
}

variable "output_url" {
  description = "Folder for the parquet files with the embeddings."
  type        = string

  validation {
    condition     = startswith(var.output_url, "s3://")
    error_message = "A URL that begins with s3://."
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
  description = "Threads a worker decodes with: about the instance's cores divided by its GPUs."
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
