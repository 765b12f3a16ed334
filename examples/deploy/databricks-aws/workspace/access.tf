# Two roles: one that Databricks takes to start nodes in this account, one that the nodes have to reach the buckets.

data "databricks_aws_assume_role_policy" "this" {
  external_id = var.databricks_account_id
}

data "databricks_aws_crossaccount_policy" "this" {
  policy_type = "customer"
  pass_roles  = [aws_iam_role.nodes.arn]
}

resource "aws_iam_role" "databricks" {
  name               = "${var.prefix}-databricks"
  description        = "Databricks' control plane: starts and ends the nodes"
  assume_role_policy = data.databricks_aws_assume_role_policy.this.json
}

resource "aws_iam_role_policy" "databricks" {
  name   = "${var.prefix}-databricks"
  role   = aws_iam_role.databricks.id
  policy = data.databricks_aws_crossaccount_policy.this.json
}

# Databricks tries the role when it is registered, and IAM takes a while until a new policy counts everywhere.
resource "time_sleep" "until_the_policy_counts" {
  create_duration = "20s"
  depends_on      = [aws_iam_role_policy.databricks]
}

data "aws_iam_policy_document" "nodes_assume" {
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
    sid       = "List"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]
    resources = [for name in setunion(var.read_buckets, var.write_buckets) : "arn:aws:s3:::${name}"]
  }

  statement {
    sid       = "Read"
    actions   = ["s3:GetObject"]
    resources = [for name in setunion(var.read_buckets, var.write_buckets) : "arn:aws:s3:::${name}/*"]
  }

  # Deleting is for the lock of a run and for the temporary objects of one that was stopped.
  statement {
    sid       = "Write"
    actions   = ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = [for name in var.write_buckets : "arn:aws:s3:::${name}/*"]
  }
}

resource "aws_iam_role" "nodes" {
  name               = "${var.prefix}-nodes"
  description        = "Nodes: read the images, write the embeddings"
  assume_role_policy = data.aws_iam_policy_document.nodes_assume.json
}

resource "aws_iam_role_policy" "buckets" {
  name   = "${var.prefix}-buckets"
  role   = aws_iam_role.nodes.id
  policy = data.aws_iam_policy_document.buckets.json
}

resource "aws_iam_instance_profile" "nodes" {
  name = "${var.prefix}-nodes"
  role = aws_iam_role.nodes.name
}
