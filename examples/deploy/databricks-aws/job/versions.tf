terraform {
  required_version = ">= 1.5"

  required_providers {
    databricks = {
      source  = "databricks/databricks"
      version = "~> 1.90"
    }
  }
}

# The workspace's API. Credentials come from DATABRICKS_CLIENT_ID and DATABRICKS_CLIENT_SECRET of the environment.
provider "databricks" {
  host = var.workspace_url
}
