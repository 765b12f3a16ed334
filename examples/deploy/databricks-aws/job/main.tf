# The job: a cluster of its own for each run, with Dask beside Spark, and the command that embeds.

locals {
  secrets = { for name, reference in var.secret_variables : name => "{{secrets/${reference}}}" }
}

data "databricks_spark_version" "gpu_ml" {
  gpu               = true
  ml                = true
  long_term_support = true
}

resource "databricks_instance_profile" "nodes" {
  instance_profile_arn = var.instance_profile_arn
}

resource "databricks_workspace_file" "wheel" {
  source = var.wheel
  path   = "${var.folder}/${basename(var.wheel)}"
}

resource "databricks_workspace_file" "cluster" {
  source = "${path.module}/cluster.yaml"
  path   = "${var.folder}/cluster.yaml"
}

resource "databricks_workspace_file" "script" {
  source = "${path.module}/embed.py"
  path   = "${var.folder}/embed.py"
}

resource "databricks_workspace_file" "init" {
  path = "${var.folder}/init.sh"
  content_base64 = base64encode(templatefile("${path.module}/init.sh.tftpl", {
    requirement = "${databricks_workspace_file.wheel.workspace_path}[${join(",", var.extras)}]"
    worker_args = jsonencode(["--nthreads", tostring(var.threads_per_worker)])
  }))
}

resource "databricks_job" "embed" {
  name                = "curator-embed"
  description         = "Embeds ${var.source_url} with ${var.model}. A run that was stopped goes on where it stopped."
  max_concurrent_runs = 1

  task {
    task_key                  = "embed"
    max_retries               = var.retries
    min_retry_interval_millis = 60000

    new_cluster {
      spark_version       = coalesce(var.spark_version, data.databricks_spark_version.gpu_ml.id)
      node_type_id        = var.node_type_id
      driver_node_type_id = coalesce(var.driver_node_type_id, var.node_type_id)
      num_workers         = var.workers
      data_security_mode  = "SINGLE_USER"
      spark_env_vars      = local.secrets

      aws_attributes {
        instance_profile_arn = databricks_instance_profile.nodes.id
        availability         = var.availability
        first_on_demand      = 1
        zone_id              = "auto"
      }

      init_scripts {
        workspace {
          destination = databricks_workspace_file.init.path
        }
      }

      dynamic "cluster_log_conf" {
        for_each = var.log_url == null ? [] : [var.log_url]

        content {
          s3 {
            destination = cluster_log_conf.value
            region      = var.log_region
          }
        }
      }
    }

    spark_python_task {
      python_file = databricks_workspace_file.script.path
      parameters = concat(
        [
          "embed", var.source_url,
          "--output", var.output_url,
          "--model", var.model, "--pretrained",
          "--batch-size", tostring(var.batch_size),
          "--threads", tostring(var.decode_threads),
          "--cluster", databricks_workspace_file.cluster.workspace_path,
          "--quiet",
        ],
        var.more_arguments,
      )
    }
  }

  email_notifications {
    on_failure = var.notify
  }
}
