output "job_id" {
  description = "What 'databricks jobs run-now' takes."
  value       = databricks_job.embed.id
}

output "job_url" {
  description = "The job in the workspace."
  value       = databricks_job.embed.url
}
