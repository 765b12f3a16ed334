variable "databricks_account_id" {
  description = "Id of the Databricks account, from the account console's top right corner."
  type        = string

  validation {
    condition     = can(regex("^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", var.databricks_account_id))
    error_message = "A Databricks account id is a UUID, such as 01234567-89ab-cdef-0123-456789abcdef."
  }
}

variable "region" {
  description = "AWS region of the workspace: the one where the buckets with the images are, as traffic between regions costs."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "Name a region as AWS does, for instance eu-west-1."
  }
}

variable "prefix" {
  description = "Beginning of every name that is created."
  type        = string
  default     = "curator-embed"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,24}$", var.prefix))
    error_message = "2 to 25 of a-z, 0-9 and '-', beginning with a letter: the prefix becomes part of a bucket's name."
  }
}

variable "cidr_block" {
  description = "Addresses of the network. Databricks takes two for every node."
  type        = string
  default     = "10.42.0.0/18"

  validation {
    condition     = can(cidrhost(var.cidr_block, 0)) && try(tonumber(split("/", var.cidr_block)[1]) <= 22, false)
    error_message = "A CIDR block of /22 or larger, for instance 10.42.0.0/18."
  }
}

variable "read_buckets" {
  description = "Buckets whose images are embedded. Nothing is written to them."
  type        = list(string)

  validation {
    condition     = length(var.read_buckets) > 0 && alltrue([for name in var.read_buckets : !strcontains(name, "/")])
    error_message = "At least one bucket, by its name alone: no s3:// and no folders."
  }
}

variable "write_buckets" {
  description = "Buckets that embeddings are written to. One that is embedded in place is named here as well."
  type        = list(string)

  validation {
    condition     = length(var.write_buckets) > 0 && alltrue([for name in var.write_buckets : !strcontains(name, "/")])
    error_message = "At least one bucket, by its name alone: no s3:// and no folders."
  }
}

variable "pricing_tier" {
  description = "Tier of the workspace. Leave null for the account's."
  type        = string
  default     = null

  validation {
    condition     = var.pricing_tier == null || contains(["STANDARD", "PREMIUM", "ENTERPRISE"], coalesce(var.pricing_tier, "-"))
    error_message = "STANDARD, PREMIUM, ENTERPRISE or null."
  }
}

variable "destroy_root_bucket" {
  description = "Whether 'terraform destroy' empties the workspace's own bucket (notebooks' results, logs) and removes it."
  type        = bool
  default     = false
}

variable "tags" {
  description = "Further tags of everything in AWS."
  type        = map(string)
  default     = {}
}
