# One instance with GPUs: it installs the package, embeds, puts its log beside the output and goes away.

terraform {
  required_version = ">= 1.5"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }
}

provider "aws" {
  region = var.region
}

locals {
  name          = "curator-embed"
  output_bucket = split("/", trimprefix(var.output_url, "s3://"))[0]
  source_bucket = split("/", trimprefix(var.source_url, "s3://"))[0]
  log_url       = "${trimsuffix(var.output_url, "/")}.curator_embed/instance.log"
  arguments = concat(
    [
      "embed", var.source_url,
      "--output", var.output_url,
      "--model", var.model, "--pretrained",
      "--batch-size", tostring(var.batch_size),
      "--threads", tostring(var.decode_threads),
      "--gpu", "--quiet",
    ],
    var.more_arguments,
  )
}

# Ubuntu 24.04 with NVIDIA's driver (595 in October 2026, so CUDA 13) and Python 3.12.
data "aws_ssm_parameter" "ami" {
  name = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
}

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "buckets" {
  statement {
    actions   = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]
    resources = [for name in toset([local.source_bucket, local.output_bucket]) : "arn:aws:s3:::${name}"]
  }

  statement {
    actions   = ["s3:GetObject"]
    resources = [for name in toset([local.source_bucket, local.output_bucket]) : "arn:aws:s3:::${name}/*"]
  }

  statement {
    actions   = ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["arn:aws:s3:::${local.output_bucket}/*"]
  }
}

resource "aws_iam_role" "this" {
  name_prefix        = "${local.name}-"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy" "buckets" {
  name   = "buckets"
  role   = aws_iam_role.this.id
  policy = data.aws_iam_policy_document.buckets.json
}

# A shell and port forwarding through Systems Manager: no key, no open port.
resource "aws_iam_role_policy_attachment" "session" {
  role       = aws_iam_role.this.name
  policy_arn = "arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "this" {
  name_prefix = "${local.name}-"
  role        = aws_iam_role.this.name
}

resource "aws_security_group" "this" {
  name_prefix = "${local.name}-"
  description = "Nothing comes in, all goes out"
  vpc_id      = var.vpc_id
}

resource "aws_vpc_security_group_egress_rule" "out" {
  security_group_id = aws_security_group.this.id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "-1"
}

resource "aws_s3_object" "wheel" {
  bucket = local.output_bucket
  key    = "curator-embed-wheels/${basename(var.wheel)}"
  source = var.wheel
  etag   = filemd5(var.wheel)
}

resource "aws_instance" "this" {
  ami                                  = data.aws_ssm_parameter.ami.insecure_value
  instance_type                        = var.instance_type
  subnet_id                            = var.subnet_id
  vpc_security_group_ids               = [aws_security_group.this.id]
  iam_instance_profile                 = aws_iam_instance_profile.this.name
  instance_initiated_shutdown_behavior = "terminate"
  user_data_replace_on_change          = true

  user_data = templatefile("${path.module}/user_data.sh.tftpl", {
    wheel_url = "s3://${aws_s3_object.wheel.bucket}/${aws_s3_object.wheel.key}"
    wheel     = basename(var.wheel)
    log_url   = local.log_url
    # Each argument in single quotes, so that the shell takes it as it is.
    command = join(" ", [for argument in local.arguments : "'${replace(argument, "'", "'\\''")}'"])
  })

  dynamic "instance_market_options" {
    for_each = var.spot ? ["spot"] : []

    content {
      market_type = instance_market_options.value
    }
  }

  metadata_options {
    http_tokens = "required"
  }

  root_block_device {
    volume_type = "gp3"
    volume_size = 150
    encrypted   = true
  }

  tags = { Name = local.name }

  depends_on = [aws_iam_role_policy.buckets]
}

output "instance_id" {
  description = "What 'aws ssm start-session --target' takes."
  value       = aws_instance.this.id
}

output "log_url" {
  description = "Where the log lies once the run has ended."
  value       = local.log_url
}
